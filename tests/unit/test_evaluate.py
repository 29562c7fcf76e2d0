"""evaluate: both runtimes agree on the same weights, and figures follow from the kept predictions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from slmops.errors import ArtifactError, ConfigError
from slmops.evaluate.config import EvaluateConfig
from slmops.evaluate.matches import same_json, same_text
from slmops.evaluate.run import (
    MAX_CLASSES,
    OTHER,
    PREDICTIONS,
    confusion_matrix,
    perplexity,
    run,
    wilson_interval,
    write_confusion_matrix,
)
from slmops.inference.runtime import open_runtime
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import run as quantize
from slmops.records import Message, read_jsonl, read_records
from tests.datasets import ACTIONS, DEVICES, write_dataset


def quick(**settings: object) -> EvaluateConfig:
    return EvaluateConfig.create({"max_new_tokens": 16} | settings)


def test_a_full_precision_model_and_its_8_bit_variant_agree(
    tiny_teacher: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    quantize(QuantizeConfig(variants=["cpu-int8"]), model=tiny_teacher, variants=tmp_path / "variants")
    whole = run(quick(), model=tiny_teacher, test=held_out_rows, evaluation=tmp_path / "whole")
    small = run(
        quick(variant="cpu-int8"), model=tmp_path / "variants", test=held_out_rows, evaluation=tmp_path / "small"
    )
    assert whole.facts["accuracy"] > 0.8
    assert small.facts["accuracy"] == pytest.approx(whole.facts["accuracy"], abs=0.06)
    assert small.facts["perplexity"] == pytest.approx(whole.facts["perplexity"], rel=0.02)
    assert small.facts["model_digest"] != whole.facts["model_digest"]


def test_figures_follow_from_the_kept_predictions(tiny_teacher: Path, held_out_rows: Path, tmp_path: Path) -> None:
    facts = run(quick(), model=tiny_teacher, test=held_out_rows, evaluation=tmp_path / "evaluation").facts
    predictions = [row for _, row in read_jsonl(tmp_path / "evaluation" / PREDICTIONS)]
    assert len(predictions) == facts["num_rows"] == 40
    assert sum(row["prediction"].strip() == row["reference"].strip() for row in predictions) == facts["num_correct"]
    assert facts["accuracy_low"] < facts["accuracy"] <= facts["accuracy_high"]
    assert sum(total for _, total in facts["by_stratum"].values()) == 40


def test_an_answer_may_be_right_by_its_rows_task(tiny_teacher: Path, held_out_rows: Path, tmp_path: Path) -> None:
    labels = [f"{action} {device}" for action in ACTIONS for device in DEVICES]
    records = [
        record.model_copy(update={"task": "classification", "messages": (record.messages[0], loud(record.messages[1]))})
        for record in read_records(held_out_rows)
    ]
    test = write_dataset(tmp_path / "test", records)
    settings = {"match": "task", "task_settings": {"classification": {"labels": labels}}, "max_rows": 10}
    facts = run(quick(**settings), model=tiny_teacher, test=test, evaluation=tmp_path / "evaluation").facts
    assert facts["exact_match"] == 0, "no reference is in lower case"
    assert facts["accuracy"] == facts["classification_label_accuracy"] > 0.8
    assert 0 < facts["classification_macro_f1"] <= 1


def test_an_unknown_task_is_said_before_anything_is_answered(
    tiny_model: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    records = [record.model_copy(update={"task": "juggling"}) for record in read_records(held_out_rows)]
    test = write_dataset(tmp_path / "test", records)
    with pytest.raises(ConfigError, match="no task is called 'juggling'"):
        run(quick(match="task"), model=tiny_model, test=test, evaluation=tmp_path / "evaluation")
    run(quick(max_rows=1), model=tiny_model, test=test, evaluation=tmp_path / "evaluation")


def loud(message: Message) -> Message:
    return message.model_copy(update={"content": f"{message.content.upper()}."})


def test_the_confusion_matrix_counts_every_kept_prediction(
    tiny_teacher: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    facts = run(quick(), model=tiny_teacher, test=held_out_rows, evaluation=tmp_path / "evaluation").facts
    classes, matrix = write_confusion_matrix(tmp_path / "evaluation", tmp_path / "out" / "confusion")
    assert json.loads((tmp_path / "out" / "confusion").read_text()) == {"classes": classes, "matrix": matrix}
    assert set(classes) == {f"{action} {device}" for action in ACTIONS for device in DEVICES} | {OTHER}
    assert sum(map(sum, matrix)) == 40
    assert sum(matrix[number][number] for number in range(len(classes) - 1)) == facts["num_correct"]


def test_answers_beyond_the_classes_count_as_other() -> None:
    def row(reference: str, prediction: str, correct: bool = False) -> dict[str, object]:
        return {"reference": reference, "prediction": prediction, "correct": correct}

    assert confusion_matrix([row('{"a": 1}', '{"a":1}', True), row("b", "b ", True), row("b", "c")]) == (
        ["b", '{"a": 1}', OTHER],
        [[1, 0, 1], [0, 1, 0], [0, 0, 0]],
    )
    many = [row(f"{number:03d}", f"{number:03d}", True) for number in range(MAX_CLASSES + 4)]
    many.append(row("long " * 40, "long " * 40, True))
    classes, matrix = confusion_matrix(many)
    assert len(classes) == MAX_CLASSES + 1
    assert matrix[-1][-1] == 5


@given(st.integers(1, 5000).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows))))
def test_the_interval_is_wilsons(counts: tuple[int, int]) -> None:
    expected = binomtest(*counts).proportion_ci(0.95, method="wilson")
    assert wilson_interval(*counts) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_perplexity_is_per_token_not_per_row() -> None:
    assert perplexity([(math.log(2) * 3, 3), (math.log(8), 1)]) == pytest.approx(2 ** (6 / 4))


@pytest.mark.parametrize(
    ("answer", "reference", "text", "json"),
    [
        ('{"a":1,"b":2}', '{"b": 2, "a": 1}', False, True),
        (" on light\n", "on light", True, False),
        ('{"a":1', '{"a":1}', False, False),
        ('{"a":1} and more', '{"a":1}', False, False),
    ],
)
def test_what_counts_as_right(answer: str, reference: str, text: bool, json: bool) -> None:
    assert same_text(answer, reference) is text
    assert same_json(answer, reference) is json


def test_a_variant_that_was_not_built_is_named(tiny_variants: Path, held_out_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lists no variant 'cpu-int8'; it holds cpu-int4"):
        run(quick(variant="cpu-int8"), model=tiny_variants, test=held_out_rows, evaluation=tmp_path / "evaluation")


def test_a_half_written_model_is_refused(tiny_model: Path, held_out_rows: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(Exception, match=r"has [\d,]+ bytes where its header says [\d,]+; copy the model again"):
        run(quick(), model=broken, test=held_out_rows, evaluation=tmp_path / "evaluation")
    with pytest.raises(ArtifactError, match="does not exist"):
        run(quick(), model=tiny_model, test=tmp_path / "nothing", evaluation=tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()


def test_answers_do_not_depend_on_what_else_is_in_the_batch(tiny_teacher: Path, held_out_rows: Path) -> None:
    short = [{"role": "user", "content": "turn on the tv 1"}]
    long = [{"role": "user", "content": "turn off the light 999 " * 5 + "turn off the fan 3"}]
    runtime = open_runtime(tiny_teacher, quantized=False, dtype="float32", num_threads=1, batch_size=2)
    together = runtime.answer([short, long], 16)
    alone = [runtime.answer([prompt], 16)[0] for prompt in (short, long)]
    streamed = [runtime.tokenizer.decode(list(runtime.stream(prompt, 16))) for prompt in (short, long)]  # type: ignore[attr-defined]
    assert together == alone == streamed
    assert together[0] == "on tv"
