"""Fixtures of the tests of lm_evaluate."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import run as quantize
from tests.lm_evaluate.lm_tasks import go_offline, write_tasks


@pytest.fixture
def task_files(held_out_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks; nothing of the test reaches a network."""
    go_offline(monkeypatch, tmp_path / "cache")
    return write_tasks(tmp_path / "tasks", held_out_rows)


@pytest.fixture(scope="session")
def teacher_variants(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher quantized: a variants artifact with `cpu-int4`."""
    path = tmp_path_factory.mktemp("teacher") / "variants"
    quantize(QuantizeConfig(), model=tiny_teacher, variants=path)
    return path
