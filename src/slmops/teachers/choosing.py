"""From logits to tokens: the likeliest, or one drawn with a chance that belongs to the question."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from slmops.cached_logits import record_dtype
from slmops.teachers.interface import Decoding

if TYPE_CHECKING:
    import numpy as np

NUCLEUS_TRIED_FIRST = 256
"""Likeliest tokens in which the nucleus of top_p is looked for before all are sorted."""


def chance(seed: int, position: int) -> float:
    """A number in [0, 1) for the token at `position` of an answer: the same whatever else is computed beside it."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


def choose(logits: torch.Tensor, decoding: Decoding, seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
    """One token for each of N distributions.

    Args:
        logits: [N, V].
        decoding: how to choose.
        seeds: [N] of the question.
        positions: [N] of the token in its answer, from 0.
    """
    if decoding.greedy:
        return logits.max(-1).indices.tolist()
    chances = [chance(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    draw = torch.tensor(chances, dtype=torch.float64, device=logits.device)
    probabilities = torch.softmax(logits.float() / decoding.temperature, dim=-1)
    if decoding.top_p >= 1.0:
        return _invert(probabilities, draw).tolist()
    chosen = _from_nucleus(probabilities, draw, decoding.top_p, NUCLEUS_TRIED_FIRST)
    if len(wide := (chosen < 0).nonzero().flatten()):
        chosen[wide] = _from_nucleus(probabilities[wide], draw[wide], decoding.top_p, logits.shape[-1])
    return chosen.tolist()


def _invert(weights: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """[N] where the running sum of `weights` [N, M] passes `draw` [N] of its total: inverse transform sampling."""
    sums = weights.double().cumsum(-1)
    index = torch.searchsorted(sums, (draw * sums[:, -1]).unsqueeze(-1), right=True).squeeze(-1)
    return index.clamp_max(weights.shape[-1] - 1)


def _from_nucleus(probabilities: torch.Tensor, draw: torch.Tensor, top_p: float, k: int) -> torch.Tensor:
    """[N] tokens drawn from the likeliest that hold `top_p` (Holtzman et al. 2020); -1 where those are more than k."""
    k = min(k, probabilities.shape[-1])
    top, ids = probabilities.topk(k, dim=-1)
    sums = top.double().cumsum(-1)
    kept = torch.where(sums - top < top_p, top, 0.0)
    chosen = ids.gather(-1, _invert(kept, draw).unsqueeze(-1)).squeeze(-1)
    if k < probabilities.shape[-1]:
        chosen = torch.where(sums[:, -1] < top_p, -1, chosen)
    return chosen


def top_k_records(logits: torch.Tensor, k: int, temperature: float) -> np.ndarray:
    """[N] records of `slmops.cached_logits` of N distributions [N, V]: the k likeliest tokens, and the rest's mass."""
    import numpy as np

    scaled = logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    k = min(k, scaled.shape[-1])
    top, ids = scaled.topk(k, dim=-1)
    log_probs = top - scaled.logsumexp(-1, keepdim=True)
    # What the top leaves of 1 is off by 1e-6 or so, and saves two more passes over the vocabulary.
    tail = (-torch.expm1(log_probs.logsumexp(-1))).clamp_min(0).log()
    records = np.empty(len(scaled), dtype=record_dtype(k))
    records["top_ids"] = ids.cpu().numpy()
    records["top_log_probs"] = log_probs.half().cpu().numpy()
    records["tail_log_prob"] = tail.cpu().numpy()
    return records
