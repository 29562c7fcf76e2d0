"""Which weights need more bits: measured by what rounding each of them alone does to the model's output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from slmops.errors import ModelError
from slmops.progress import log, track
from slmops.quantize.drift import Reference, rows_to_compare
from slmops.training.batches import Row, collate
from slmops.training.head import SparseHead

UNIT_POSITIONS = 192
"""Predicted tokens on which one unit alone is measured; the whole is measured on all."""

TOGETHER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
"""Modules of a layer that read the same, and get the same bits: the runtime multiplies them at once."""

HEAD = "lm_head"


@dataclass(frozen=True)
class Choice:
    """Which modules are kept in more bits, and what that comes to."""

    raised: list[str]
    """Names of modules."""
    kl: float
    """Mean KL of the whole, in nats, with these modules in more bits and all others in few."""
    plain_kl: float
    """The same with no module raised."""


class Trial:
    """A model whose weights are exchanged to see what its output does."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Row]) -> None:
        self.head = SparseHead(model)
        self.modules = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
        self.rows = rows
        self.reference = Reference(list(rows), self._logits(rows).log_softmax(-1))
        few = rows_to_compare(rows, UNIT_POSITIONS)
        self.few = Reference(few, self.reference.log_probs[: sum(len(row.targets) for row in few)])

    def kl(self, weights: Mapping[str, torch.Tensor], *, few: bool = False) -> float:
        """Mean KL of the model with `weights` in place of its own, by module; of `few` rows or of all."""
        against = self.few if few else self.reference
        with self._exchanged(weights):
            return against.drift(self._logits(against.rows)).kl

    @torch.no_grad()
    def _logits(self, rows: Sequence[Row]) -> torch.Tensor:
        device = self.head.head.weight.device
        return torch.cat([self.head.logits(collate([row], 0, device)).cpu() for row in rows])

    @contextmanager
    def _exchanged(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        own = {name: self.modules[name].weight.data for name in weights}
        try:
            for name, weight in weights.items():
                self.modules[name].weight.data = weight.to(own[name])
            yield
        finally:
            for name, weight in own.items():
                self.modules[name].weight.data = weight


def choose_raised(
    trial: Trial, few_bits: Mapping[str, torch.Tensor], more_bits: Mapping[str, torch.Tensor], budget: float
) -> Choice:
    """The modules that have to be in more bits for the whole to keep within `budget`, as few bytes as possible.

    Units are raised in the order of what each of them alone adds to the divergence, for each weight in it.

    Args:
        trial: the model in full precision.
        few_bits: its weights as they are in few bits, by module.
        more_bits: the same in more bits.
        budget: mean KL in nats.

    Raises:
        ModelError: not even all modules in more bits keep within it.
    """
    plain = trial.kl(few_bits)
    if plain <= budget:
        return Choice([], plain, plain)
    order = _by_sensitivity(trial, few_bits)

    def kl_with(count: int) -> float:
        raised = _names(order[:count])
        return trial.kl({name: (more_bits if name in raised else few_bits)[name] for name in few_bits})

    low, high, found = 0, len(order), kl_with(len(order))
    if found > budget:
        raise ModelError(
            f"with all its weights in 8 bits the model still drifts by {found:.4f} nats, more than the "
            f"{budget:.4f} that drift_budget leaves; raise drift_budget, or take a smaller block_size"
        )
    while high - low > 1:
        middle = (low + high) // 2
        kl = kl_with(middle)
        low, high, found = (low, middle, kl) if kl <= budget else (middle, high, found)
    log.info("%d of %d groups of weights keep 8 bits: KL %.4f, %.4f without", high, len(order), found, plain)
    return Choice(sorted(_names(order[:high])), found, plain)


def _by_sensitivity(trial: Trial, few_bits: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
    units = list(_units(few_bits))
    scores = []
    for unit in track(units, "measuring sensitivity", len(units), "groups of weights"):
        weights = {name: few_bits[name] for name in unit}
        scores.append(trial.kl(weights, few=True) / sum(weight.numel() for weight in weights.values()))
    return [units[at] for at in sorted(range(len(units)), key=lambda at: (-scores[at], at))]


def _units(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """`names` one by one, but those together that get the same bits."""
    left = dict.fromkeys(names)
    for name in list(left):
        if name not in left:
            continue
        together = next((group for group in TOGETHER if name.endswith(group)), None)
        unit: tuple[str, ...] = (name,)
        if together:
            layer = name[: -len(next(end for end in together if name.endswith(end)))]
            unit = tuple(layer + end for end in together if layer + end in left)
        for member in unit:
            del left[member]
        yield unit


def _names(units: Iterable[tuple[str, ...]]) -> set[str]:
    return {name for unit in units for name in unit}
