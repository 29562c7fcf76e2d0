"""distill on a real, tiny teacher: objectives agree with each other, and what does not fit is refused early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from slmops import artifacts, torch_models
from slmops.cached_logits import open_cached_logits
from slmops.distill.config import DistillConfig
from slmops.distill.on_policy import is_on_policy, own_answers
from slmops.distill.run import run
from slmops.errors import ArtifactError, ConfigError, ModelError
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.generate_responses.run import run as generate
from slmops.records import read_records
from slmops.training.batches import encode_rows


def quick(**settings: object) -> DistillConfig:
    defaults = {"learning_rate": 2e-3, "num_epochs": 2, "temperature": 2.0, "keep_layers": [0, 3], "dtype": "float32"}
    return DistillConfig.create(defaults | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "responses"},
        {"objective": "logits", "teacher_logits": "cached"},
        {"objective": "logits", "teacher_logits": "online", "hard_label_weight": 0.3},
        {"divergence": "reverse_kl"},
        {"divergence": "jensen_shannon", "divergence_settings": {"beta": 0.2}},
        {"teacher_logits": "online", "hidden_weight": 1.0, "attention_weight": 0.5},
        {"teacher_logits": "online", "on_policy_end": 1.0, "max_answer_tokens": 16},
        {"student_shape": {"num_hidden_layers": 2}, "layer_rule": "importance", "keep_layers": []},
        {"student_weights": "fresh", "student_shape": {"num_hidden_layers": 2}, "keep_layers": [], "num_epochs": 4},
        {"packing": True},
    ],
    ids=[
        "responses",
        "cached logits",
        "online logits",
        "reverse KL",
        "Jensen-Shannon",
        "layers",
        "own answers",
        "important layers",
        "fresh weights",
        "packed",
    ],
)
def test_a_student_of_two_layers_learns(
    settings: dict[str, object], tiny_teacher: Path, tiny_responses: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    sidecar = run(
        quick(**settings),
        responses=tiny_responses,
        validation=held_out_rows,
        teacher=tiny_teacher,
        student=tiny_teacher,
        model=tmp_path / "student",
    )
    assert sidecar.facts["validation_loss"] < 0.7 * sidecar.facts["validation_curve"][0][1]
    assert AutoConfig.from_pretrained(tmp_path / "student").num_hidden_layers == 2
    assert {summary.step for summary in sidecar.ancestors} == {
        "import", "prepare_data", "finetune", "generate_responses"
    }  # fmt: skip


def test_cached_logits_teach_the_same_as_the_teacher_itself(
    tiny_teacher: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    """With all of the vocabulary kept, both are the same loss, but for the rounding of what is kept to 16 bits."""
    vocabulary = AutoConfig.from_pretrained(tiny_teacher).vocab_size
    config = GenerateResponsesConfig(
        max_new_tokens=16, max_rows=64, logits_top_k=min(vocabulary, 1024), logits_temperature=2.0, dtype="float32"
    )
    generate(config, prompts=train_rows, teacher=tiny_teacher, responses=tmp_path / "responses")
    curves = [
        run(
            quick(teacher_logits=source, num_epochs=2),
            responses=tmp_path / "responses",
            validation=held_out_rows,
            teacher=tiny_teacher,
            student=tiny_teacher,
            model=tmp_path / source,
        ).facts["loss_curve"]
        for source in ("cached", "online")
    ]
    np.testing.assert_allclose([loss for _, loss in curves[0]], [loss for _, loss in curves[1]], rtol=0.02, atol=2e-3)


def facts_of(path: Path, settings: dict[str, object], inputs: dict[str, Path]) -> dict[str, Any]:
    return run(quick(**settings), **inputs, model=path).facts


@pytest.fixture
def inputs(tiny_teacher: Path, tiny_responses: Path, held_out_rows: Path) -> dict[str, Path]:
    return {
        "responses": tiny_responses,
        "validation": held_out_rows,
        "teacher": tiny_teacher,
        "student": tiny_teacher,
    }


def test_two_like_teachers_teach_as_one(inputs: dict[str, Path], tiny_teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {"teacher_logits": "online", "num_epochs": 0.5}
    one = facts_of(tmp_path / "one", settings, inputs)
    weighted = settings | {"teacher_weights": [3.0, 1.0]}
    two = facts_of(tmp_path / "two", weighted, inputs | {"second_teacher": tiny_teacher})
    np.testing.assert_allclose(two["loss_curve"], one["loss_curve"], rtol=1e-3)


def test_the_weight_of_a_teacher_counts(inputs: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    """A student that starts as its first teacher has nothing to learn from it, and all from an untrained one."""
    settings: dict[str, object] = {"teacher_logits": "online", "num_epochs": 0.1, "keep_layers": []}
    both = inputs | {"second_teacher": tiny_model}
    first_losses = [
        facts_of(tmp_path / str(number), settings | {"teacher_weights": weights}, both)["loss_curve"][0][1]
        for number, weights in enumerate(([1.0, 0.0], [1.0, 1.0], [0.0, 1.0]))
    ]
    assert first_losses[0] == pytest.approx(0.0, abs=1e-5)
    assert first_losses[1] == pytest.approx(first_losses[2] / 2, rel=1e-4)
    assert first_losses[2] > 0.5


def test_matched_layers_come_closer(inputs: dict[str, Path], tmp_path: Path) -> None:
    """What the layers' distance adds to the loss shrinks, and what is learned beside is not in the model."""
    settings: dict[str, object] = {"teacher_logits": "online", "num_epochs": 3, "hidden_weight": 100.0}
    curve = [loss for _, loss in facts_of(tmp_path / "student", settings, inputs)["loss_curve"]]
    assert min(curve[-4:]) < 0.7 * curve[0]
    weights = load_file(tmp_path / "student" / "model.safetensors")
    assert not [name for name in weights if "widen" in name or "projections" in name]


def test_steps_become_on_policy_as_the_schedule_says() -> None:
    config = DistillConfig(teacher_logits="online", on_policy_start=0.2, on_policy_end=1.0)
    steps = 4000
    chosen = [is_on_policy(step, step / steps, config) for step in range(steps)]
    assert chosen == [is_on_policy(step, step / steps, config) for step in range(steps)], "alike in every process"
    for part, expected in ((slice(0, 400), 0.24), (slice(1800, 2200), 0.6), (slice(3600, 4000), 0.96)):
        assert np.mean(chosen[part]) == pytest.approx(expected, abs=0.06)


def test_own_answers_take_the_place_of_the_teachers(tiny_teacher: Path, train_rows: Path) -> None:
    model = torch_models.load_model(tiny_teacher, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer = torch_models.load_tokenizer(tiny_teacher)
    rows = encode_rows(tokenizer, read_records(train_rows)[:12], 128)
    config = DistillConfig(
        teacher_logits="online", on_policy_start=1, on_policy_end=1, answer_temperature=0.01, max_answer_tokens=16
    )
    choose = own_answers(model, tokenizer, config)
    assert choose is not None
    torch.manual_seed(0)
    chosen = choose(0, 0.0, rows)
    right = 0
    for row, own in zip(rows, chosen, strict=True):
        prompt = row.input_ids[: row.targets[0]]
        assert own.input_ids[: len(prompt)] == prompt
        assert own.targets == list(range(len(prompt), len(own.input_ids)))
        right += own.input_ids == row.input_ids
    assert right >= 6, "a teacher that answers itself mostly says what its training rows say"


def test_labels_alone_and_no_training_at_all(
    inputs: dict[str, Path], train_rows: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    """What a distilled student is compared with: the same student, trained on the labels, and not trained."""
    labels = inputs | {"responses": train_rows}
    trained = facts_of(tmp_path / "labels", {"objective": "responses"}, labels)
    untrained = facts_of(tmp_path / "untrained", {"objective": "responses", "num_epochs": 0}, labels)
    assert untrained["num_steps"] == 0
    assert untrained["validation_loss"] == trained["validation_curve"][0][1]
    assert trained["validation_loss"] < 0.7 * untrained["validation_loss"]
    with pytest.raises(ArtifactError, match="holds chat_dataset, but this input takes responses"):
        refuse(tmp_path, quick(), **labels)


def test_a_divergence_of_a_teams_own(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by its entry point, with its settings."""
    package = tmp_path / "site" / "own_losses-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: own-losses\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[slmops.divergences]\nsquares = own_losses:squares\nbroken = own_losses:broken\n"
    )
    (tmp_path / "site" / "own_losses.py").write_text(
        "def squares(student, teacher, scale=1.0):\n    return scale * (student.exp() - teacher.exp()).square().sum()\n"
        "def broken(student, teacher):\n    return student - teacher\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    settings: dict[str, object] = {"divergence": "squares", "num_epochs": 0.5}
    one = facts_of(tmp_path / "one", settings, inputs)["loss_curve"][0][1]
    ten = facts_of(tmp_path / "ten", settings | {"divergence_settings": {"scale": 10.0}}, inputs)["loss_curve"][0][1]
    assert ten == pytest.approx(10 * one, rel=1e-3)
    for wrong, complaint in (
        ({"divergence": "broken"}, "divergence broken must give one finite number"),
        ({"divergence": "squares", "divergence_settings": {"size": 2}}, "does not take divergence_settings"),
        ({"divergence": "cubes"}, r"no divergence is called 'cubes'; there are: .*forward_kl.*squares"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            refuse(tmp_path, quick(**wrong), **inputs)


def test_a_student_larger_than_its_teacher_is_told_so(
    inputs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, object] = {
        "objective": "responses",
        "num_epochs": 0,
        "student_weights": "fresh",
        "student_shape": {"num_hidden_layers": 6},
        "keep_layers": [],
    }
    with caplog.at_level("WARNING", logger="slmops"):
        facts_of(tmp_path / "student", settings, inputs)
    assert "parameters, more than its teacher" in caplog.text


def test_kept_logits_take_the_documented_size(tiny_responses: Path) -> None:
    cached = open_cached_logits(tiny_responses, artifacts.read(tiny_responses).facts["num_rows"])
    per_token = sum(array[:1].nbytes for array in (cached.top_ids, cached.top_log_probs, cached.tail_log_prob))
    assert per_token == 8 * (4 + 2) + 4
    mass = np.exp(cached.top_log_probs.astype(np.float64)).sum(-1) + np.exp(cached.tail_log_prob)
    np.testing.assert_allclose(mass, 1.0, atol=2e-3)


def refuse(tmp_path: Path, config: DistillConfig, **paths: Path) -> None:
    try:
        run(config, model=tmp_path / "student", **paths)
    finally:
        assert not (tmp_path / "student").exists()


def test_another_temperature_than_the_kept_logits_is_refused(
    tiny_teacher: Path, tiny_responses: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"temperature is 1\.0, but the logits were kept at 2\.0"):
        refuse(
            tmp_path,
            quick(temperature=1.0),
            responses=tiny_responses,
            validation=held_out_rows,
            teacher=tiny_teacher,
            student=tiny_teacher,
        )


def test_kept_logits_of_another_teacher_or_of_other_answers_are_refused(
    inputs: dict[str, Path], tiny_model: Path, tiny_responses: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=r"were kept of teacher \w{12}, .*; give the teacher that answered"):
        refuse(tmp_path, quick(), **inputs | {"teacher": tiny_model})
    changed = tmp_path / "responses"
    shutil.copytree(tiny_responses, changed)
    text = (changed / "rows.jsonl").read_text()
    (changed / "rows.jsonl").write_text(text.replace("light", "xight"))
    with pytest.raises(ArtifactError, match=r"rows\.jsonl was changed after the artifact was written"):
        refuse(tmp_path, quick(), **inputs | {"responses": changed})


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"hidden_weight": 1.0}, "hidden_weight of 1 needs a teacher that runs beside the student"),
        ({"on_policy_end": 0.5}, "on_policy_end of 0.5 needs a teacher that runs beside the student"),
        ({"teacher_weights": [0.0]}, "teacher_weights must be 0 or more and not all 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        quick(**settings)


def test_teachers_that_do_not_fit_the_settings_are_refused(
    inputs: dict[str, Path], tiny_teacher: Path, tmp_path: Path
) -> None:
    several = inputs | {"second_teacher": tiny_teacher}
    with pytest.raises(ConfigError, match="kept logits are of one teacher; set teacher_logits=online"):
        refuse(tmp_path, quick(), **several)
    with pytest.raises(ConfigError, match="teacher_weights has 1 numbers for 2 teachers"):
        refuse(tmp_path, quick(teacher_logits="online", teacher_weights=[1.0]), **several)
    with pytest.raises(ConfigError, match=r"layer_map must name one of the teacher's layers 0 to 3 .* got \[0\]"):
        refuse(tmp_path, quick(teacher_logits="online", hidden_weight=1.0, layer_map=[0]), **inputs)


def test_responses_without_logits_are_refused(
    tiny_teacher: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    config = GenerateResponsesConfig(max_new_tokens=16, max_rows=20, dtype="float32")
    generate(config, prompts=train_rows, teacher=tiny_teacher, responses=tmp_path / "responses")
    with pytest.raises(ArtifactError, match="holds no logits; run generate_responses with logits_top_k"):
        refuse(
            tmp_path,
            quick(),
            responses=tmp_path / "responses",
            validation=held_out_rows,
            teacher=tiny_teacher,
            student=tiny_teacher,
        )


def test_a_student_with_another_tokenizer_is_refused_before_a_model_is_loaded(
    tiny_teacher: Path, tiny_model: Path, tiny_responses: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"different tokenizers .*; use objective=responses"):
        refuse(
            tmp_path,
            quick(),
            responses=tiny_responses,
            validation=held_out_rows,
            teacher=tiny_teacher,
            student=other,
        )


def test_a_student_with_another_chat_template_is_refused_before_a_model_is_loaded(
    tiny_teacher: Path, tiny_model: Path, tiny_responses: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    with open(other / "chat_template.jinja", "a") as template:
        template.write("{# another #}")
    with pytest.raises(ModelError, match=r"different chat templates .*; give the student the teacher's"):
        refuse(
            tmp_path,
            quick(),
            responses=tiny_responses,
            validation=held_out_rows,
            teacher=tiny_teacher,
            student=other,
        )


def test_layers_that_do_not_exist_are_named(
    tiny_teacher: Path, tiny_responses: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"keep_layers must be in rising order, each from 0 to 3, got \[0, 9\]"):
        refuse(
            tmp_path,
            quick(keep_layers=[0, 9]),
            responses=tiny_responses,
            validation=held_out_rows,
            teacher=tiny_teacher,
            student=tiny_teacher,
        )
