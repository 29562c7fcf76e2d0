"""merge_responses: what a user sees of it."""

from __future__ import annotations

from pathlib import Path

from slmops import artifacts
from slmops.merge_responses.config import MergeResponsesConfig
from slmops.merge_responses.run import run
from slmops.records import ROWS, read_records, write_jsonl


def test_keeps_the_first_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with artifacts.writing(tmp_path / "dataset", kind="chat_dataset", step="test") as draft:
        write_jsonl(draft.path / ROWS, ({"id": f"{n:016x}", "messages": turns} for n in range(3)))

    sidecar = run(MergeResponsesConfig(max_rows=2), dataset=tmp_path / "dataset", result=tmp_path / "result")

    assert [record.id for record in read_records(tmp_path / "result")] == [f"{n:016x}" for n in range(2)]
    assert sidecar.facts["num_rows"] == 2
