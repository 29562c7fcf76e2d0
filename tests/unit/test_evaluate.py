"""evaluate: both runtimes agree on the same weights, and figures follow from the kept predictions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from slmops.errors import ArtifactError, ConfigError, DataError
from slmops.evaluate.config import EvaluateConfig
from slmops.evaluate.losses import own_losses, reference_losses
from slmops.evaluate.matches import same_json, same_text
from slmops.evaluate.metrics import (
    MAX_CLASSES,
    OTHER,
    calibration,
    confusion_matrix,
    macro_f1,
    overlap,
    perplexity,
    wilson_interval,
)
from slmops.evaluate.run import PREDICTIONS, run, write_confusion_matrix
from slmops.inference.runtime import Runtime, open_runtime
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import run as quantize
from slmops.records import ChatRecord, Message, read_jsonl, read_records
from tests.datasets import ACTIONS, DEVICES, chat_record, write_dataset


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
    assert small.facts["mean_confidence"] == pytest.approx(whole.facts["mean_confidence"], abs=0.02)
    for facts in (whole.facts, small.facts):
        assert facts["num_confidences"] == 40
        gap = abs(facts["accuracy"] - facts["mean_confidence"])
        assert gap - 1e-9 <= facts["expected_calibration_error"] < 0.5
        assert facts["macro_f1"] > 0.7
        assert facts["rouge_l"] >= facts["rouge_2"] > 0.7
        assert 70 < facts["bleu"] <= facts["chrf"] <= 100


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


def row(reference: str, prediction: str, correct: bool = False, confidence: float | None = None) -> dict[str, object]:
    return {"reference": reference, "prediction": prediction, "correct": correct, "confidence": confidence}


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


class Watched:
    """A real runtime that keeps what it was asked to give losses of."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.asked: list[ChatRecord] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.runtime, name)

    def answer_losses(self, records: list[ChatRecord]) -> list[tuple[float, int]]:
        self.asked += records
        return self.runtime.answer_losses(records)


@pytest.fixture(params=["full_precision", "cpu-int4"])
def runtime(request: pytest.FixtureRequest, tiny_model: Path, tiny_variants: Path) -> Runtime:
    quantized = request.param != "full_precision"
    directory = tiny_variants / request.param if quantized else tiny_model
    return open_runtime(directory, quantized=quantized, dtype="float32", num_threads=1, batch_size=4)


def test_the_confidence_is_the_product_of_the_probabilities_of_the_answers_tokens(
    tiny_teacher: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    import torch
    import transformers

    run(quick(max_rows=3), model=tiny_teacher, test=held_out_rows, evaluation=tmp_path / "evaluation")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tiny_teacher)
    for _, kept in read_jsonl(tmp_path / "evaluation" / PREDICTIONS):
        prompt = tokenizer.apply_chat_template(kept["prompt"], add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer(kept["prediction"])["input_ids"], tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        probabilities = logits.softmax(-1)[range(len(answer)), answer]
        assert kept["confidence"] == pytest.approx(float(probabilities.prod()), rel=1e-3)
        if kept["exact"]:
            assert kept["loss"] == pytest.approx(float(-probabilities.log().mean()), rel=1e-3)


def test_only_answers_that_differ_from_their_reference_cost_another_pass(runtime: Runtime) -> None:
    records = [chat_record(f"turn on the light {number}", "on light") for number in range(4)]
    answers = ["on light", "off fan", " \n", "on light "]
    references = reference_losses(runtime, records, 2)
    watched = Watched(runtime)
    losses = own_losses(watched, records, answers, references, 2)  # type: ignore[arg-type]
    assert [record.completion for record in watched.asked] == ["off fan", "on light "]
    assert [record.prompt for record in watched.asked] == [records[1].prompt, records[3].prompt]
    assert losses[0] == references[0]
    assert losses[2] is None, "nothing was said that one could be sure of"
    assert losses[1] != references[1]
    assert None not in (losses[1], losses[3])


def test_a_row_that_is_too_long_for_the_model_takes_no_other_with_it(runtime: Runtime) -> None:
    good, long = chat_record("turn on the tv 1", "on tv"), chat_record("turn on the tv 2", "on tv " * 1024)
    (expected,) = reference_losses(runtime, [good], 4)
    losses = reference_losses(runtime, [good, long, good], 4)
    assert losses == [pytest.approx(expected, rel=1e-5), None, pytest.approx(expected, rel=1e-5)]
    assert own_losses(runtime, [good], [long.completion], [expected], 4) == [None]
    with pytest.raises(DataError, match=r"none of the 2 rows fits into the model's context.*give shorter rows"):
        reference_losses(runtime, [long, long], 4)


def test_calibration_compares_how_sure_the_model_is_with_how_often_it_is_right() -> None:
    sure = [row("a", "a", correct, 0.95) for correct in (True, True, True, False)]
    unsure = [row("a", "b", correct, 0.05) for correct in (True, False)]
    facts = calibration([*sure, *unsure, row("a", "")])
    assert facts["num_confidences"] == 6
    assert facts["mean_confidence"] == pytest.approx((4 * 0.95 + 2 * 0.05) / 6)
    assert facts["expected_calibration_error"] == pytest.approx((4 * (0.95 - 0.75) + 2 * (0.5 - 0.05)) / 6)
    assert facts["brier_score"] == pytest.approx((3 * 0.05**2 + 0.95**2 + 0.95**2 + 0.05**2) / 6)
    low, high = facts["reliability"]
    assert (low["low"], low["high"], low["num_rows"], low["accuracy"]) == (0.0, 0.1, 2, 0.5)
    assert (high["low"], high["high"], high["num_rows"], high["accuracy"]) == (0.9, 1.0, 4, 0.75)
    assert calibration([row("a", "")]) == {}


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_every_confidence_is_in_the_bin_that_holds_it(pairs: list[tuple[float, bool]]) -> None:
    facts = calibration([row("a", "a", correct, sure) for sure, correct in pairs])
    assert sum(one["num_rows"] for one in facts["reliability"]) == len(pairs)
    for one in facts["reliability"]:
        assert one["low"] - 1e-12 <= one["confidence"] <= one["high"] + 1e-12
        inside = [sure for sure, _ in pairs if one["low"] < sure <= one["high"] or sure == one["low"] == 0]
        assert len(inside) == one["num_rows"]
    assert 0 <= facts["expected_calibration_error"] <= 1
    assert abs(facts["expected_calibration_error"]) <= math.sqrt(facts["brier_score"]) + 1e-9


def test_macro_f1_weighs_rare_classes_like_frequent_ones() -> None:
    frequent = [row("yes", "yes", True)] * 8 + [row("yes", "no")] * 2
    rare = [row("no", "no", True), row("no", "yes"), row("no", "perhaps")]
    assert macro_f1(frequent + rare) == pytest.approx((2 * 8 / (10 + 9) + 2 * 1 / (3 + 3)) / 2)
    assert macro_f1([row("Yes", "yes.", True)] * 3 + [row("No", "no", True)] * 3) == 1
    assert macro_f1([row("{", "{")] * 3 + [row("}", "}")] * 3) == 0, "what is wrong is wrong, even if it reads the same"


@pytest.mark.parametrize(
    "references",
    [
        pytest.param(["yes"] * 9, id="one answer"),
        pytest.param([f"answer {number // 2}" for number in range(20)], id="few rows of each"),
        pytest.param([f"{number // 3}" for number in range(3 * MAX_CLASSES + 3)], id="many answers"),
        pytest.param(["long " * 40] * 5 + ["short"] * 5, id="long answers"),
    ],
)
def test_there_is_no_macro_f1_without_classes(references: list[str]) -> None:
    assert macro_f1([row(reference, reference, True) for reference in references]) is None


def test_overlap_is_what_the_field_calls_by_these_names() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, corpus_chrf

    references = ["the lamp in the kitchen is on", "all four doors were closed at nine", "no heater runs in the cellar"]
    answers = ["the kitchen lamp is on now", "all doors closed", "the heater in the cellar does not run"]
    facts = overlap([row(reference, answer) for reference, answer in zip(references, answers, strict=True)])
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(reference, answer) for reference, answer in zip(references, answers, strict=True)]
    for name, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert facts[name] == pytest.approx(sum(score[kind].fmeasure for score in scores) / 3)
    assert facts["bleu"] == pytest.approx(corpus_bleu(answers, [references]).score)
    assert facts["chrf"] == pytest.approx(corpus_chrf(answers, [references]).score)
    assert "tok:13a" in facts["bleu_signature"]


def test_overlap_of_short_foreign_and_wordless_answers_is_not_zero_by_construction() -> None:
    short = overlap([row("on light", "on light")] * 3)
    assert (short["rouge_1"], short["rouge_2"], short["rouge_l"], short["bleu"]) == (1, 1, 1, pytest.approx(100))
    assert 0 < overlap([row("выключи свет", "включи свет")])["rouge_1"] < 1
    assert 0 < overlap([row("打开厨房的灯", "打开客厅的灯")])["rouge_2"] < 1
    one_word = overlap([row("yes", "yes"), row("no", "yes"), row("42 °", "")])
    assert one_word["rouge_1"] == pytest.approx(1 / 3)
    assert "rouge_2" not in one_word
    assert not {"rouge_1", "rouge_l"} & overlap([row("→", "→")]).keys()
