"""withhold_labels: a few labels of each class are left, and no other can be found in what is written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from slmops.errors import DataError
from slmops.records import read_records
from slmops.withhold_labels.config import WithholdLabelsConfig
from slmops.withhold_labels.run import run
from tests.datasets import chat_record, write_dataset

LABELS = ("card_arrival", "exchange_rate", "lost_phone")


def rows(num_rows: int = 60) -> list[tuple[str, str]]:
    return [(f"question {number}", LABELS[number % 3]) for number in range(num_rows)]


def test_a_few_labels_of_each_class_are_left_and_the_others_are_nowhere(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "rows", [chat_record(prompt, label, label) for prompt, label in rows()])
    labelled, prompts = run(
        WithholdLabelsConfig(rows_per_class=4), rows=data, labelled=tmp_path / "few", prompts=tmp_path / "all"
    )
    few, everything = read_records(tmp_path / "few"), read_records(tmp_path / "all")
    assert Counter(record.completion for record in few) == dict.fromkeys(LABELS, 4)
    assert few == read_records(data)[:12], "the first of each class, as they were"
    assert [record.prompt for record in everything] == [record.prompt for record in read_records(data)]
    assert Counter(record.completion for record in everything) == {**dict.fromkeys(LABELS, 4), "?": 48}
    text = (tmp_path / "all" / "rows.jsonl").read_text()
    assert sum(text.count(f'"{label}"') for label in LABELS) == 2 * 12, "answer and stratum of the labelled rows only"
    assert labelled.facts == {"num_rows": 12, "num_classes": 3, "rows_of_smallest_class": 4}
    assert prompts.facts["num_labelled"] == 12


def test_rows_that_come_without_a_label_are_prompts(tmp_path: Path) -> None:
    pairs = [(prompt, label if number < 5 else "none") for number, (prompt, label) in enumerate(rows())]
    data = write_dataset(tmp_path / "rows", [chat_record(*pair) for pair in pairs])
    config = WithholdLabelsConfig(no_label="none")
    labelled, prompts = run(config, rows=data, labelled=tmp_path / "few", prompts=tmp_path / "all")
    assert (labelled.facts["num_rows"], labelled.facts["rows_of_smallest_class"]) == (5, 1)
    assert prompts.facts["num_rows"] == 60


def test_rows_without_any_label_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "rows", [chat_record(prompt, "?") for prompt, _ in rows(12)])
    with pytest.raises(DataError, match=r"no row of .* has a label; all answer '\?'"):
        run(WithholdLabelsConfig(), rows=data, labelled=tmp_path / "few", prompts=tmp_path / "all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows"]
