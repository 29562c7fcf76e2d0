"""Model directories: one that slmops did not write is taken as it is, and one that is not whole is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slmops.errors import ArtifactError, ModelError
from slmops.models import open_model


@pytest.fixture
def foreign(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_a_directory_of_somebody_else_gets_a_sidecar_of_its_own(foreign: Path) -> None:
    sidecar = open_model(foreign)
    assert (sidecar.kind, sidecar.step, sidecar.facts["source"]) == ("hf_model", "import", "model")
    (foreign.parent / "model.partial").mkdir()
    assert open_model(foreign) == sidecar, "what lies beside it says nothing about it"


def test_a_killed_step_s_output_is_told_from_a_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model is no directory; give a model directory"):
        open_model(tmp_path / "model")
    (tmp_path / "model.partial").mkdir()
    with pytest.raises(ArtifactError, match=r"model is not there: the step that writes it did not finish"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "keep_bytes", "says"),
    [
        ("config.json", None, r"has no config\.json"),
        ("config.json", 10, r"config\.json is not JSON"),
        ("tokenizer.json", None, r"has no tokenizer\.json"),
        ("model.safetensors", None, r"has no model\.safetensors"),
        ("model.safetensors", 4, r"has no valid safetensors header"),
        ("model.safetensors", 100_000, r"has 100,000 bytes where its header says"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(foreign: Path, file: str, keep_bytes: int | None, says: str) -> None:
    path = foreign / file
    content = path.read_bytes()
    path.unlink()
    if keep_bytes is not None:
        path.write_bytes(content[:keep_bytes])
    with pytest.raises(ModelError, match=says):
        open_model(foreign)
