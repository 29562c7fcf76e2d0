"""What the student's loss is made of: distances to teachers, labels, layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from slmops.cached_logits import CachedLogits
from slmops.distill.matching import Matching
from slmops.errors import ModelError
from slmops.training.batches import Batch
from slmops.training.head import BlockLoss, SparseHead, TileLoss, at_targets, labels_loss
from slmops.training.losses import Divergence, log_probs, outcomes


class Source(Protocol):
    """Where a teacher's distribution comes from."""

    def distances(self, batch: Batch, options: dict[str, bool]) -> tuple[TileLoss, Any]:
        """The distance to the teacher, and the outputs of one that runs where `options` ask for more of them."""


@dataclass(frozen=True)
class CachedSource:
    """The k likeliest tokens that answers were kept with."""

    cached: CachedLogits
    divergence: Divergence
    temperature: float

    def distances(self, batch: Batch, options: dict[str, bool]) -> tuple[TileLoss, None]:
        starts = self.cached.row_starts
        positions = np.concatenate([np.arange(starts[row.index], starts[row.index + 1]) for row in batch.rows])
        if len(positions) != len(batch.target_ids):
            raise ModelError(
                f"the kept logits are of {len(positions)} tokens in rows {[row.index for row in batch.rows]}, whose "
                f"answers have {len(batch.target_ids)}; run generate_responses again"
            )
        kept = self.cached.records[positions]
        device = batch.input_ids.device
        ids = torch.from_numpy(kept["top_ids"].astype(np.int64)).to(device)
        tail = torch.from_numpy(np.maximum(kept["tail_log_prob"], np.finfo(np.float32).min)).to(device)
        top = torch.from_numpy(kept["top_log_probs"].astype(np.float32)).to(device)
        teacher = torch.cat([top, tail.unsqueeze(-1)], -1)

        def tile(at: slice) -> BlockLoss:
            return lambda logits, rows: self._distance(logits, ids[at][rows], teacher[at][rows])

        return tile, None

    def _distance(self, logits: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        student = outcomes(logits, ids, self.temperature)
        return self.divergence(student, teacher[:, : student.shape[-1]])


@dataclass(frozen=True)
class OnlineSource:
    """A teacher that runs beside the student."""

    head: SparseHead
    divergence: Divergence
    temperature: float

    def distances(self, batch: Batch, options: dict[str, bool]) -> tuple[TileLoss, Any]:
        with torch.no_grad():
            outputs = self.head.decode(batch, **options)
            hidden = at_targets(outputs.last_hidden_state, batch)
        kept = outputs if options else None  # else its cache of keys and values would be held with it

        def tile(at: slice) -> BlockLoss:
            with torch.no_grad():
                teacher = self.head.tile(hidden[at])
            return lambda logits, rows: self.divergence(
                log_probs(logits, self.temperature), log_probs(teacher(rows), self.temperature)
            )

        return tile, kept


@dataclass(frozen=True)
class Objective:
    """The weighted sum of the distances to all teachers, times the temperature's square, and of what is added to it.

    The square keeps the gradient's size independent of the temperature (Hinton et al. 2015, arXiv:1503.02531).
    """

    sources: Sequence[Source]
    weights: Sequence[float]
    """Of the sources; they add up to 1."""
    temperature: float
    hard_label_weight: float
    matching: Matching | None

    def shares_prefix(self) -> bool:
        """Whether all teachers that run may read once what rows begin with."""
        return all(source.head.shares_prefix() for source in self.sources if isinstance(source, OnlineSource))

    def __call__(self, head: SparseHead, batch: Batch) -> torch.Tensor:
        """Sum of the loss over the N positions of `batch`."""
        options = self.matching.options if self.matching else {}
        # Teachers first: what their forward passes need is free again before the student's activations are there.
        distances = [source.distances(batch, options) for source in self.sources]
        student = head.decode(batch, **options)
        soft = (1 - self.hard_label_weight) * self.temperature**2
        tiles = [(soft * weight, tile) for weight, (tile, _) in zip(self.weights, distances, strict=True)]
        if self.hard_label_weight:
            tiles.append((self.hard_label_weight, labels_loss(batch)))
        loss = head.loss(at_targets(student.last_hidden_state, batch), _weighted(tiles))
        return loss + self.matching.loss(student, distances[0][1], batch) if self.matching else loss


def _weighted(tiles: Sequence[tuple[float, TileLoss]]) -> TileLoss:
    def tile(at: slice) -> BlockLoss:
        blocks = [(weight, of_tile(at)) for weight, of_tile in tiles]
        return lambda logits, rows: torch.stack([weight * block(logits, rows) for weight, block in blocks]).sum()

    return tile
