"""Artifacts are whole or absent, name what is wrong with them, and know their lineage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slmops import artifacts
from slmops.artifacts import SIDECAR, Sidecar
from slmops.config import Config
from slmops.errors import ArtifactError, DataError


class ExampleConfig(Config):
    """One setting."""

    seed: int = 0


def write(path: Path, text: str = "content", *parents: Sidecar, step: str = "example") -> Sidecar:
    with artifacts.writing(path, kind="chat_dataset", step=step, config=ExampleConfig(), parents=parents) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "rows.jsonl").write_text(text)
        draft.facts |= {"num_rows": 1, "nested": {"a": [1]}}
    assert draft.sidecar
    return draft.sidecar


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = write(tmp_path / "data")
    assert artifacts.read(tmp_path / "data") == written
    assert artifacts.expect(tmp_path / "data", "responses", "chat_dataset") == written
    assert written.config == {"seed": 0}
    assert written.metadata()["num_rows"] == 1
    assert "nested" not in written.metadata(), "KFP's store takes scalars only"
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "nothing half-written is left"


def test_the_digest_is_of_the_files_and_nothing_else(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    assert write(tmp_path / "b", step="another").digest == first.digest
    assert write(tmp_path / "c", "other").digest != first.digest
    assert artifacts.digest_of(tuple(reversed(first.files))) == first.digest


def test_an_artifact_carries_its_whole_lineage(tmp_path: Path) -> None:
    root = write(tmp_path / "root", "1", step="first")
    left = write(tmp_path / "left", "2", root, step="second")
    right = write(tmp_path / "right", "3", root, step="second")
    leaf = write(tmp_path / "leaf", "4", left, right, step="third")
    assert leaf.parents == (left.digest, right.digest)
    assert [summary.digest for summary in leaf.ancestors] == [root.digest, left.digest, right.digest]
    assert leaf.ancestors[0].facts == root.facts


def test_a_failing_body_leaves_the_old_artifact_alone(tmp_path: Path) -> None:
    old = write(tmp_path / "data", "old")

    def fail() -> None:
        with artifacts.writing(tmp_path / "data", kind="responses", step="x") as draft:
            (draft.path / "rows.jsonl").write_text("half")
            raise DataError("stopped")

    with pytest.raises(DataError, match="stopped"):
        fail()
    assert artifacts.read(tmp_path / "data") == old
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_new_artifact_replaces_an_old_one_and_what_a_kill_left(tmp_path: Path) -> None:
    write(tmp_path / "data", "old")
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "rubbish").write_text("x")
    new = write(tmp_path / "data", "new")
    assert (tmp_path / "data" / "sub" / "rows.jsonl").read_text() == "new"
    assert [entry.path for entry in new.files] == ["sub/rows.jsonl"]


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    code = """
import pathlib, sys, time
from slmops import artifacts
with artifacts.writing(pathlib.Path(sys.argv[1]), kind="chat_dataset", step="x") as draft:
    (draft.path / "rows.jsonl").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    path = tmp_path / "data"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    with pytest.raises(ArtifactError, match="does not exist"):
        artifacts.read(path)
    assert write(path).digest == artifacts.read(path).digest


def test_the_output_of_a_pipeline_may_exist_if_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")


@pytest.mark.parametrize("foreign", ["file", "folder"])
def test_what_is_no_artifact_is_never_overwritten(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "thesis"
    if foreign == "folder":
        path.mkdir()
    kept = path / "thesis.txt" if foreign == "folder" else path
    kept.write_text("important")
    with pytest.raises(ArtifactError, match="exists and is not an artifact of slmops; choose another output"):
        write(path)
    assert kept.read_text() == "important"


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with pytest.raises(ArtifactError, match="does not exist; check the path, or run the step"):
        artifacts.read(path)
    path.mkdir()
    with pytest.raises(ArtifactError, match=r"has no slmops.json: the step that wrote it did not finish"):
        artifacts.read(path)
    write(path)
    with pytest.raises(ArtifactError, match="holds chat_dataset, but this input takes hf_model or variants"):
        artifacts.expect(path, "hf_model", "variants")
    (path / "sub" / "rows.jsonl").write_text("cut")
    with pytest.raises(ArtifactError, match=r"rows.jsonl has 3 bytes, slmops.json says 7 bytes; run the step"):
        artifacts.read(path)
    (path / "sub" / "rows.jsonl").unlink()
    with pytest.raises(ArtifactError, match=r"rows.jsonl is missing, slmops.json says 7 bytes"):
        artifacts.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "ABC"}, r"slmops.json: digest: "),
        ({"kind": "cake"}, r"slmops.json: kind: "),
        ({"schema_version": 2}, r"slmops.json: schema_version: "),
        ({"surprise": 1}, r"slmops.json: surprise: "),
    ],
)
def test_a_sidecar_is_read_strictly(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write(tmp_path / "data")
    sidecar = tmp_path / "data" / SIDECAR
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | change))
    with pytest.raises(ArtifactError, match=message):
        artifacts.read(tmp_path / "data")


def test_a_sidecar_that_is_no_json_is_an_error_of_the_artifact(tmp_path: Path) -> None:
    write(tmp_path / "data")
    os.truncate(tmp_path / "data" / SIDECAR, 40)
    with pytest.raises(ArtifactError, match=r"slmops.json: file: .*run the step that wrote it again"):
        artifacts.read(tmp_path / "data")
