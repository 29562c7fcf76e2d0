"""lm_evaluate: the figures of a model and of a variant are those of a plain computation; what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from slmops.errors import ArtifactError, ConfigError, ModelError
from slmops.lm_evaluate.quiet import quiet
from slmops.lm_evaluate.results import RESULTS, numbers
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import run as quantize
from slmops.records import write_jsonl
from tests.lm_evaluate.lm_tasks import (
    NUM_ROWS,
    TASKS,
    TURN,
    Plain,
    PlainGenAI,
    answers,
    expected,
    lm_evaluate,
    rows_of,
    samples,
    write_task,
)


def test_the_figures_of_a_model_are_those_of_transformers_alone(
    tiny_teacher: Path, held_out_rows: Path, task_files: Path, tmp_path: Path
) -> None:
    rows, plain = rows_of(held_out_rows), Plain(tiny_teacher)
    sidecar = lm_evaluate(tmp_path, tiny_teacher, task_files, "choose", "answer", "read")
    figures = expected(plain, rows)
    assert {name: sidecar.facts[name] for name in figures} == pytest.approx(figures, rel=1e-4)
    assert figures["choose_acc"] > 0.8, "the teacher has learnt this"
    accuracy = figures["choose_acc"]
    assert sidecar.facts["choose_acc_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (NUM_ROWS - 1)))
    assert sidecar.facts["choose_num_rows"] == NUM_ROWS
    assert sidecar.facts["model_digest"] == sidecar.parents[0]
    kept = samples(tmp_path, "choose")
    scores = [float(score) for score, _greedy in kept[0]["filtered_resps"]]
    assert scores == pytest.approx(plain.scores(TURN.format(rows[0]["request"])), abs=1e-3)


def test_the_figures_of_a_model_are_those_of_lm_eval_on_its_own(
    tiny_teacher: Path, task_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(task_files)
    with quiet():
        manager = TaskManager(include_path=str(task_files), include_defaults=False)
        lm = HFLM(pretrained=str(tiny_teacher), device="cpu", dtype="float32", batch_size=1, revision=None)
        alone = evaluate(lm=lm, task_dict=manager.load(["choose", "answer", "read"]), bootstrap_iters=1000)
    sidecar = lm_evaluate(tmp_path, tiny_teacher, task_files, "choose", "answer", "read")
    ours = json.loads((tmp_path / "lm_evaluation" / RESULTS).read_text())
    for task, figures in alone["results"].items():
        assert numbers(ours["results"][task]) == pytest.approx(numbers(figures), rel=1e-4)
    assert sidecar.facts["num_tasks"] == 3


def test_a_variant_is_scored_as_its_runtime_does(
    teacher_variants: Path, held_out_rows: Path, task_files: Path, tmp_path: Path
) -> None:
    rows, plain = rows_of(held_out_rows), PlainGenAI(teacher_variants / "cpu-int4")
    sidecar = lm_evaluate(tmp_path, teacher_variants, task_files, "choose", "answer", "read", variant="cpu-int4")
    figures = expected(plain, rows)
    assert {name: sidecar.facts[name] for name in figures} == pytest.approx(figures, rel=1e-4)
    assert sidecar.facts["runtime"].startswith("onnxruntime-genai")
    assert answers(tmp_path, "answer") == [plain.answer(TURN.format(row["request"])) for row in rows]


def test_long_texts_and_prompts_are_cut_alike_for_a_model_and_its_8_bit_variant(
    tiny_teacher: Path, held_out_rows: Path, task_files: Path, tmp_path: Path
) -> None:
    """Windows of 16 tokens for longer texts, and prompts that lose their beginning."""
    quantize(QuantizeConfig(variants=["cpu-int8"]), model=tiny_teacher, variants=tmp_path / "variants")
    rows = [row | {"request": " ".join([row["request"]] * 4)} for row in rows_of(held_out_rows)]
    write_jsonl(task_files / "rows.jsonl", rows)
    settings: dict[str, Any] = {"max_rows": 4, "max_length": 16}
    whole = lm_evaluate(tmp_path, tiny_teacher, task_files, "choose", "read", **settings).facts
    settings["variant"] = "cpu-int8"
    small = lm_evaluate(tmp_path, tmp_path / "variants", task_files, "choose", "read", **settings).facts
    assert small["read_byte_perplexity"] == pytest.approx(whole["read_byte_perplexity"], rel=0.003)
    assert small["choose_acc"] == whole["choose_acc"]
    settings["max_length"] = 1024
    uncut = lm_evaluate(tmp_path, tmp_path / "variants", task_files, "choose", "read", **settings).facts
    assert uncut["read_byte_perplexity"] != pytest.approx(small["read_byte_perplexity"], rel=0.01)


def test_examples_are_shown_and_rows_limited(tiny_model: Path, task_files: Path, tmp_path: Path) -> None:
    shown = TASKS["answer"] | {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    write_task(task_files, "answer", shown)
    settings: dict[str, Any] = {"fewshot": "fixed", "num_fewshot": 2, "max_rows": 3}
    sidecar = lm_evaluate(tmp_path, tiny_model, task_files, "answer", **settings)
    prompts = [row["arguments"][0][0] for row in samples(tmp_path, "answer")]
    assert (len(prompts), sidecar.facts["answer_num_rows"]) == (3, 3)
    assert [prompt.count("<|im_start|>assistant") for prompt in prompts] == [3, 3, 3]


def test_what_is_kept_is_what_lm_eval_says(tiny_model: Path, task_files: Path, tmp_path: Path) -> None:
    strict = {"name": "strict-match", "filter": [{"function": "take_first"}]}
    write_task(task_files, "answer", TASKS["answer"] | {"filter_list": [strict]})
    sidecar = lm_evaluate(tmp_path, tiny_model, task_files, "answer", max_rows=5)
    results = json.loads((tmp_path / "lm_evaluation" / RESULTS).read_text())
    assert results["results"]["answer"]["exact_match,strict-match"] == sidecar.facts["answer_exact_match_strict_match"]
    assert sidecar.facts["answer_exact_match_strict_match_stderr"] >= 0
    assert sidecar.write_metrics(tmp_path / "metrics")["answer_num_rows"] == 5
    assert results["n-samples"]["answer"] == {"original": NUM_ROWS, "effective": 5}


@pytest.mark.slow
def test_a_group_of_ones_own_has_a_figure_of_its_own(tiny_model: Path, task_files: Path, tmp_path: Path) -> None:
    """lm_eval's own list is read too, as a group may name its tasks."""
    again = {"task": "again", **TASKS["choose"]}
    group = {"group": "both", "task": ["choose", again], "aggregate_metric_list": [{"metric": "acc"}]}
    (task_files / "both.yaml").write_text(yaml.safe_dump(group))
    facts = lm_evaluate(tmp_path, tiny_model, task_files, "both").facts
    assert facts["num_tasks"] == 2
    assert facts["both_acc"] == facts["choose_acc"] == facts["both_again_acc"]


def test_nothing_of_lm_eval_is_heard(
    tiny_model: Path, task_files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lm_evaluate(tmp_path, tiny_model, task_files, "choose", "answer", "read", max_rows=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("tasks", "settings", "said"),
    [
        (["tasks/choose.yaml"], {}, r"tasks go by their names, got \['tasks/choose.yaml'\]"),
        (["choose"], {"target": "endpoint"}, "target=endpoint, and a model is given too"),
        (["choose"], {"variant": "cpu-int4"}, "holds hf_model|has no slmops.json"),
        (["choose"], {"num_fewshot": 3}, "counts only with fewshot=fixed"),
        ([], {}, "tasks: list should have at least 1 item"),
    ],
)
def test_bad_settings_are_refused(
    tasks: list[str], settings: dict[str, Any], said: str, tiny_model: Path, task_files: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, ArtifactError), match=said):
        lm_evaluate(tmp_path, tiny_model, task_files, *tasks, **settings)
    assert not (tmp_path / "lm_evaluation").exists()


def test_neither_model_nor_endpoint_is_refused(task_files: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model is given; give the step a model, or set target=endpoint"):
        lm_evaluate(tmp_path, None, task_files, "choose")


def test_a_variant_does_not_sample(tiny_variants: Path, task_files: Path, tmp_path: Path) -> None:
    drawn = {"generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 0.8}}
    write_task(task_files, "answer", TASKS["answer"] | drawn)
    with pytest.raises(ConfigError, match="task answer samples its answers"):
        lm_evaluate(tmp_path, tiny_variants, task_files, "answer", variant="cpu-int4")


def test_a_model_without_a_chat_template_is_evaluated_as_a_base_model(
    tiny_model: Path, task_files: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "chat_template.jinja").unlink()
    lm_evaluate(tmp_path, base, task_files, "choose", max_rows=1)
    with pytest.raises(ModelError, match="has no chat template"):
        lm_evaluate(tmp_path, base, task_files, "choose", max_rows=1, apply_chat_template=True)


def test_settings_load_without_torch_and_lm_eval() -> None:
    code = (
        "import sys, slmops.lm_evaluate.config; print([n for n in ('torch', 'lm_eval', 'numpy') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
