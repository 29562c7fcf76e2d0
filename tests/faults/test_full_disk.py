"""A full disk, for real: a small file system in memory. Each step says so, and leaves nothing that looks complete."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from slmops.errors import DiskFullError

Run = Callable[[Path], object]


def refuse(small_disk: Path, step: Run) -> None:
    with pytest.raises(DiskFullError, match=r"no space left while (writing|building) .*; free some space"):
        step(small_disk / "output")
    assert not (small_disk / "output").exists()
    assert not list(small_disk.glob("*.partial")), "nothing half-written is left behind"


def test_finetune(small_disk: Path, tiny_model: Path, train_rows: Path, held_out_rows: Path) -> None:
    from slmops.finetune.config import FinetuneConfig
    from slmops.finetune.run import run

    config = FinetuneConfig(num_epochs=0.1, method="full", dtype="float32")
    inputs = {"train": train_rows, "validation": held_out_rows, "base": tiny_model}
    refuse(small_disk, lambda output: run(config, **inputs, model=output))


def test_generate_responses(small_disk: Path, tiny_teacher: Path, train_rows: Path) -> None:
    from slmops.generate_responses.config import GenerateResponsesConfig
    from slmops.generate_responses.run import run

    config = GenerateResponsesConfig(max_new_tokens=16, logits_top_k=512, dtype="float32")
    refuse(small_disk, lambda output: run(config, prompts=train_rows, teacher=tiny_teacher, responses=output))


def test_quantize(small_disk: Path, tiny_model: Path) -> None:
    from slmops.quantize.config import QuantizeConfig
    from slmops.quantize.run import run

    refuse(small_disk, lambda output: run(QuantizeConfig(), model=tiny_model, variants=output))


def test_evaluate(small_disk: Path, tiny_variants: Path, held_out_rows: Path) -> None:
    from slmops.evaluate.config import EvaluateConfig
    from slmops.evaluate.run import run

    (small_disk / "filler").write_bytes(b"x" * 510 * 1024)
    config = EvaluateConfig(variant="cpu-int4", max_new_tokens=8)
    refuse(small_disk, lambda output: run(config, model=tiny_variants, test=held_out_rows, evaluation=output))
