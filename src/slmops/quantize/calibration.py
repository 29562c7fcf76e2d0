"""Calibration: rows of the kind that the model will see, on which quantizers measure and drift is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from olive.data.registry import Registry
from safetensors.torch import load_file, save_file

from slmops import torch_models
from slmops.errors import DataError
from slmops.records import read_records
from slmops.training.batches import Row, encode_rows

DATASET = "slmops_calibration"
"""Name of the rows' loader in Olive's registry."""

HELD_OUT_EVERY = 5
"""Of so many rows one is kept from the quantizers, to measure drift on."""
MIN_TOKENS = 512
"""Fewer say too little about what a layer reads."""
BATCH_TOKENS = 4096
"""Tokens that go through the model together."""


@dataclass(frozen=True)
class Calibration:
    """Rows as training encodes them, in two parts."""

    fit: list[Row]
    """What quantizers measure on."""
    held_out: list[Row]
    """What drift is measured on."""


def read_calibration(data: Path, model: Path, num_rows: int, max_length: int) -> Calibration:
    """The first `num_rows` records of `data` that have at most `max_length` tokens of `model`.

    Raises:
        DataError: they are too few.
    """
    tokenizer = torch_models.load_tokenizer(model)
    rows = encode_rows(tokenizer, read_records(data)[:num_rows], max_length)
    fit = [row for at, row in enumerate(rows) if at % HELD_OUT_EVERY]
    held_out = rows[::HELD_OUT_EVERY]
    num_tokens = sum(len(row.input_ids) for row in fit)
    if num_tokens < MIN_TOKENS:
        raise DataError(
            f"{len(rows)} calibration rows of {data} leave {num_tokens} tokens to measure on, at least {MIN_TOKENS} "
            "are needed; give more or longer rows, or raise calibration_rows or calibration_max_length"
        )
    return Calibration(fit, held_out)


def same_length_batches(rows: Sequence[Row]) -> list[torch.Tensor]:
    """[B, L] token ids of all rows, without padding, which a quantizer would take for text."""
    batches = []
    for length, group in groupby(sorted(rows, key=lambda row: len(row.input_ids)), lambda row: len(row.input_ids)):
        ids = torch.tensor([row.input_ids for row in group])
        batches += list(torch.split(ids, max(1, BATCH_TOKENS // length)))
    return batches


def olive_data(rows: Sequence[Row], file: Path) -> dict[str, Any]:
    """Olive's data configuration for `rows`, which are written to `file` for it to find."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{at:06d}": batch for at, batch in enumerate(same_length_batches(rows))}, file)
    return {
        "name": DATASET,
        "type": "DataContainer",
        "load_dataset_config": {"type": DATASET, "params": {"file": str(file)}},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "dataloader_config": {"type": "no_auto_batch_dataloader"},
    }


@Registry.register_dataset(DATASET)  # type: ignore[untyped-decorator]  # Olive has no types
def load_calibration(file: str) -> list[tuple[dict[str, torch.Tensor], int]]:
    """What Olive's passes read: inputs of the model, and a label that they ignore."""
    batches = load_file(file)
    return [
        ({"input_ids": batches[name], "attention_mask": torch.ones_like(batches[name])}, 0) for name in sorted(batches)
    ]
