"""Chat records on disk: what is read back, and the line that an error names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.errors import ArtifactError, DataError
from slmops.records import MAX_LINE_BYTES, ROWS, ChatRecord, read_jsonl, read_records, write_jsonl

RECORD = {
    "id": "0123456789abcdef",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Größe?\u2028\n"},
        {"role": "assistant", "content": "10 µm"},
    ],
    "stratum": "size",
}


def dataset(tmp_path: Path, *lines: str) -> Path:
    (tmp_path / ROWS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return tmp_path


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    record = ChatRecord.model_validate(RECORD)
    assert write_jsonl(tmp_path / ROWS, [record, RECORD]) == 2
    assert read_records(tmp_path) == [record, record]
    assert record.prompt == RECORD["messages"][:2]
    assert record.completion == "10 µm"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"id": "XYZ"}, "id: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "robot", "content": "x"}] * 2}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": ""}] * 2}, "messages.0.content"),
        ({"more": 1}, "more: "),
    ],
)
def test_a_row_that_is_no_record_is_named_by_file_and_line(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    path = dataset(tmp_path, json.dumps(RECORD), "", json.dumps(RECORD | changed))
    with pytest.raises(DataError, match=rf"{ROWS}:3: not a chat record: {message}"):
        read_records(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b'"\xff"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"x" * (MAX_LINE_BYTES + 1), "line is longer than"),
    ],
)
def test_a_line_that_is_no_object_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"rows.jsonl:3: {message}"):
        list(read_jsonl(path))


def test_blank_lines_are_skipped_but_counted_and_the_last_newline_may_lack(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n  \n{"a": 2}')
    assert list(read_jsonl(path)) == [(2, {"a": 1}), (4, {"a": 2})]


def test_absent_and_empty_datasets_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"rows.jsonl does not exist; check the path"):
        read_records(tmp_path)
    with pytest.raises(DataError, match="has no rows; give the step that wrote it more data"):
        read_records(dataset(tmp_path))


@given(st.lists(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text(), max_size=3), max_size=5))
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    assert write_jsonl(path, rows) == len(rows)
    assert [row for _, row in read_jsonl(path)] == rows
