"""How far a variant, as it is shipped, has moved from the model in full precision on held-out calibration rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from slmops.errors import ModelError
from slmops.inference.runtime import open_runtime
from slmops.training.batches import Row

MAX_POSITIONS = 512
"""Predicted tokens whose distributions are kept: 100 MB for a vocabulary of 49,152."""


@dataclass(frozen=True)
class Drift:
    """Over all tokens of the answers."""

    kl: float
    """Mean KL(full precision ‖ variant) in nats."""
    top1_agreement: float
    """Share of tokens at which both find the same one likeliest."""


@dataclass(frozen=True)
class Reference:
    """What the model in full precision says of rows."""

    rows: list[Row]
    log_probs: torch.Tensor
    """[N, V] at all targets of `rows`, one row behind the other."""

    def drift(self, logits: torch.Tensor) -> Drift:
        """Drift of another model with `logits` [N, V] at the same places.

        Raises:
            ModelError: the divergence is no finite number.
        """
        found = logits.float().log_softmax(-1)
        kl = (self.log_probs.exp() * (self.log_probs - found)).sum(-1).mean().item()
        if not math.isfinite(kl):
            raise ModelError(
                f"its divergence from the model in full precision is {kl}: one of them gives logits that are not "
                "finite numbers; have the model answer in full precision, and choose another variant or block_size"
            )
        same = self.log_probs.argmax(-1) == found.argmax(-1)
        return Drift(max(0.0, kl), same.float().mean().item())  # rounding may take it below 0


def rows_to_compare(rows: Sequence[Row], max_positions: int = MAX_POSITIONS) -> list[Row]:
    """The first rows that together have at most `max_positions` targets, and at least one row."""
    kept: list[Row] = []
    num_positions = 0
    for row in rows:
        num_positions += len(row.targets)
        if kept and num_positions > max_positions:
            break
        kept.append(row)
    return kept


def drift_of_variant(directory: Path, reference: Reference, num_threads: int) -> Drift:
    """Drift of a variant's directory.

    Raises:
        ModelError: it does not load, or answers with what are no numbers.
    """
    runtime = open_runtime(directory, quantized=True, dtype="auto", num_threads=num_threads)
    vocabulary = reference.log_probs.shape[1]
    found = []
    for row in reference.rows:
        logits = torch.from_numpy(runtime.logits(row.input_ids[:-1]))
        found.append(logits[[target - 1 for target in row.targets], :vocabulary].float())
    return reference.drift(torch.cat(found))
