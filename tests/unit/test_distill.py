"""distill on a real, tiny teacher: objectives agree with each other, and what does not fit is refused early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from slmops import artifacts
from slmops.cached_logits import open_cached_logits
from slmops.distill.config import DistillConfig
from slmops.distill.run import run
from slmops.errors import ArtifactError, ConfigError, ModelError
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.generate_responses.run import run as generate


def quick(**settings: object) -> DistillConfig:
    defaults = {"learning_rate": 2e-3, "num_epochs": 2, "temperature": 2.0, "keep_layers": [0, 3], "dtype": "float32"}
    return DistillConfig.create(defaults | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "responses"},
        {"objective": "logits", "teacher_logits": "cached"},
        {"objective": "logits", "teacher_logits": "online", "hard_label_weight": 0.3},
    ],
    ids=["responses", "cached logits", "online logits"],
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
