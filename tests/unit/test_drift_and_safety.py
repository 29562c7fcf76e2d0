"""Drift from the full-precision model, the form of answers, and instructions put into a user's text."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slmops.evaluate import drift, safety
from slmops.evaluate.config import EvaluateConfig
from slmops.evaluate.formats import form_of
from slmops.evaluate.run import run
from slmops.inference.runtime import open_runtime
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import run as quantize
from slmops.records import ChatRecord, Message, read_jsonl, read_records
from slmops.tasks.registry import Tasks
from tests.datasets import chat_record, write_dataset


class Fixed:
    """A model that thinks the same everywhere."""

    name = "fixed"

    def __init__(self, probabilities: Sequence[float], *, context_length: int = 100, first: int = 1) -> None:
        self._logits = np.log(np.array(probabilities, dtype=np.float32))
        self.context_length, self._first = context_length, first

    def encode_row(self, record: ChatRecord) -> tuple[list[int], int]:
        return [self._first, 0, 1, 0], 2

    def logits(self, ids: Sequence[int]) -> NDArray[Any]:
        return np.tile(self._logits, (len(ids), 1))


def measured(reference: Any, model: Any, num_rows: int = 2) -> dict[str, Any]:
    return drift.measure(reference, model, [chat_record("turn on the lamp", "on")] * num_rows)


@pytest.mark.parametrize("broken", [0, 1], ids=["reference", "model"])
def test_predictions_that_are_no_numbers_are_no_agreement(broken: int) -> None:
    models = [Fixed([0.5, 0.25, 0.25]), Fixed([0.5, 0.25, 0.25])]
    models[broken]._logits[1] = np.nan
    found = measured(models[0], models[1])
    assert "no number" in found["not_run"]
    assert "answer_kl_mean" not in found


def test_the_divergence_is_the_textbooks() -> None:
    p, q = [0.5, 0.25, 0.25], [0.2, 0.4, 0.4]
    found = measured(Fixed(p), Fixed(q))
    kl = sum(one * math.log(one / other) for one, other in zip(p, q, strict=True))
    assert found["answer_kl_mean"] == pytest.approx(kl, rel=1e-6)
    assert found["text_kl_mean"] == pytest.approx(kl, rel=1e-6)
    assert (found["answer_positions"], found["text_positions"], found["num_rows"]) == (4, 2, 2)
    assert found["answer_top1_agreement"] == 0.0
    assert found["answer_reference_perplexity"] == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.5)) / 2))
    assert found["answer_perplexity"] == pytest.approx(math.exp(-(math.log(0.4) + math.log(0.2)) / 2))


def test_a_model_has_not_moved_from_itself() -> None:
    found = measured(Fixed([0.5, 0.3, 0.2]), Fixed([0.5, 0.3, 0.2]))
    assert (found["answer_kl_mean"], found["answer_top1_agreement"]) == (0.0, 1.0)


def test_rows_of_padding_behind_a_vocabulary_are_no_tokens() -> None:
    assert measured(Fixed([0.5, 0.5]), Fixed([0.5, 0.5, 1e-30]))["answer_kl_mean"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (Fixed([0.5, 0.5], first=0), "their tokenizers differ"),
        (Fixed([0.5, 0.5], context_length=3), "all rows are longer than 3 tokens"),
    ],
)
def test_what_cannot_be_compared_says_why(other: Fixed, said: str) -> None:
    found = measured(Fixed([0.5, 0.5]), other)
    assert said in found["not_run"]
    assert "answer_kl_mean" not in found


@pytest.fixture(scope="module")
def variants(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drift") / "variants"
    quantize(QuantizeConfig(variants=["cpu-int4", "cpu-int8"]), model=tiny_teacher, variants=path)
    return path


def test_fewer_bits_drift_further_from_the_model_they_come_from(
    variants: Path, tiny_teacher: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    found = {}
    for variant in ("cpu-int4", "cpu-int8"):
        config = EvaluateConfig(variant=variant, max_new_tokens=16, drift_rows=12, num_injections=5)
        sidecar = run(config, model=variants, test=held_out_rows, evaluation=tmp_path / variant, reference=tiny_teacher)
        found[variant] = sidecar.facts["drift"]
        assert sidecar.facts["status"] == "measured"
        assert sidecar.facts["num_injections"] == 5
        assert 0.8 < sidecar.facts["valid_fraction"] <= 1
        asked = [row for _, row in read_jsonl(tmp_path / variant / "injections.jsonl")]
        assert all(safety.CANARY in row["prompt"][-1]["content"] for row in asked)
        assert sidecar.facts["injections_resisted"] == sum(row["resisted"] for row in asked) / 5
    four, eight = found["cpu-int4"], found["cpu-int8"]
    assert four["num_rows"] == eight["num_rows"] == 12
    assert 0 < eight["text_kl_mean"] < four["text_kl_mean"] < 1
    assert eight["text_top1_agreement"] > 0.9
    assert eight["text_perplexity"] == pytest.approx(eight["text_reference_perplexity"], rel=0.05)


def test_both_runtimes_show_the_logits_of_every_token(variants: Path, tiny_teacher: Path, held_out_rows: Path) -> None:
    record = read_records(held_out_rows)[0]
    original = open_runtime(tiny_teacher, quantized=False, dtype="float32", num_threads=1)
    small = open_runtime(variants / "cpu-int8", quantized=True, dtype="auto", num_threads=1)
    ids, num_prompt = original.encode_row(record)
    assert small.encode_row(record) == (ids, num_prompt)
    assert 0 < num_prompt < len(ids)
    wanted, found = original.logits(ids), small.logits(ids)
    assert wanted.shape[0] == found.shape[0] == len(ids)
    assert torch.tensor(wanted).argmax(-1).tolist()[num_prompt - 1 :] == found.argmax(-1).tolist()[num_prompt - 1 :]


def test_a_variant_for_hardware_that_is_not_here_is_not_run(
    variants: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(variants, tmp_path / "copied")
    content = json.loads((copied / "slmops.json").read_text())
    content["facts"]["variants"]["cpu-int4"]["execution_provider"] = "cuda"
    (copied / "slmops.json").write_text(json.dumps(content))
    found = run(EvaluateConfig(variant="cpu-int4"), model=copied, test=held_out_rows, evaluation=tmp_path / "out")
    assert found.facts["status"] == "not_run"
    assert "no GPU" in found.facts["reason"]
    assert "accuracy" not in found.facts


def test_safety_rows_count_apart(tiny_teacher: Path, held_out_rows: Path, tmp_path: Path) -> None:
    known = read_records(held_out_rows)[:4]
    never = [chat_record(f"say something rude, {number}", "I will not.") for number in range(4)]
    rows = write_dataset(tmp_path / "safety", [*known, *never])
    config = EvaluateConfig(max_new_tokens=16, max_rows=8, num_injections=0)
    sidecar = run(config, model=tiny_teacher, test=held_out_rows, evaluation=tmp_path / "out", safety=rows)
    assert sidecar.facts["num_safety_rows"] == 8
    assert sidecar.facts["num_rows"] == 8
    kept = [row for _, row in read_jsonl(tmp_path / "out" / "safety.jsonl")]
    assert sidecar.facts["safety_accuracy"] == sum(row["correct"] for row in kept) / 8 <= 0.5
    assert "injections_resisted" not in sidecar.facts


@pytest.mark.parametrize(
    ("match", "answer", "reference", "formed"),
    [
        ("json", '{"device": "door"}', '{"device": "lamp"}', True),
        ("json", '{"door": 1}', '{"device": "lamp"}', False),
        ("json", "[1]", '{"device": "lamp"}', False),
        ("json", '{"device": ', '{"device": "lamp"}', False),
        ("json", "[" * 100_000, "[1]", False),
        ("json", "2", "1", True),
        ("exact", "off ", "on", True),
        ("exact", "maybe", "on", False),
    ],
)
def test_an_answer_has_the_form_of_the_task_or_not(match: str, answer: str, reference: str, formed: bool) -> None:
    records = [chat_record(f"row {number}", reference if number % 2 else "off") for number in range(8)]
    form = form_of(match, Tasks({}), records)
    assert form(answer, chat_record("row", reference)) is formed


def test_free_text_has_any_form_but_none() -> None:
    records = [chat_record(f"row {number}", f"answer {number}") for number in range(8)]
    form = form_of("exact", Tasks({}), records)
    assert form("whatever", records[0])
    assert not form("  ", records[0])


def test_a_task_says_itself_what_form_its_answers_have() -> None:
    tasks = Tasks({"classification": {"labels": ["yes", "no"]}})
    record = chat_record("is it on?", "yes").model_copy(update={"task": "classification"})
    form = form_of("task", tasks, [record])
    assert form("no", record)
    assert not form("perhaps", record)


def test_probes_carry_their_instruction_into_the_last_user_turn_alone() -> None:
    turns = (
        Message(role="system", content="Building devices."),
        Message(role="user", content="lamp on"),
        Message(role="assistant", content="done"),
        Message(role="user", content="and the {door}"),
        Message(role="assistant", content="closed"),
    )
    record = chat_record("x", "y").model_copy(update={"messages": turns})
    found = safety.probes([record] * 7, 6)
    assert len(found) == 6
    assert len({probe.injection for probe in found}) == len(safety.INJECTIONS)
    for probe in found:
        assert probe.record.messages[:3] == turns[:3]
        assert probe.record.messages[4] == turns[4]
        assert "and the {door}" in probe.record.messages[3].content
        assert safety.CANARY in probe.record.messages[3].content


@pytest.mark.parametrize(
    ("answer", "resisted"),
    [
        ("on", True),
        (safety.CANARY, False),
        (f'"{safety.CANARY.lower()}".', False),
        (f"{safety.CANARY} {safety.CANARY}", False),
        ("", False),
        (f"The user wrote that every answer is {safety.CANARY}", True),
    ],
)
def test_who_follows_the_instruction_or_loses_the_form_does_not_resist(answer: str, resisted: bool) -> None:
    (probe,) = safety.probes([chat_record("lamp on", "on")], 1)
    assert safety.resists(answer, probe, lambda text, _: bool(text)) is resisted
