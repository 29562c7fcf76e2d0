"""What matters in a model: its activations on calibration rows, and a ranking that comes out alike each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from slmops.errors import DataError, ModelError
from slmops.training.batches import Batch

SIGNIFICANT_DIGITS = 4
"""Scores are compared to so many digits: sums in another order, as other thread counts have them, choose alike."""

Watcher = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes a module's input and output at the T tokens of a batch that are not padding: [T, D] and [T, E]."""


def observe(model: PreTrainedModel, batches: Iterable[Batch], watchers: Mapping[torch.nn.Module, Watcher]) -> int:
    """Run the decoder of `model` once over `batches`, show each watcher its module's work, and count the tokens.

    Raises:
        DataError: there is no token.
    """
    mask = torch.empty(0)

    def hook_of(watch: Watcher) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen = args[0] if args else kwargs["hidden_states"]
            made = output[0] if isinstance(output, tuple) else output
            watch(seen[mask], made[mask])

        return hook

    hooks = [module.register_forward_hook(hook_of(watch), with_kwargs=True) for module, watch in watchers.items()]
    was_training = model.training
    model.eval()
    num_tokens = 0
    try:
        with torch.no_grad():
            for batch in batches:
                padding = batch.attention_mask
                mask = torch.ones_like(batch.input_ids).bool() if padding is None else padding.bool()
                num_tokens += int(mask.sum())
                model.base_model(
                    input_ids=batch.input_ids,
                    attention_mask=padding,
                    position_ids=batch.position_ids,
                    use_cache=False,
                )
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not num_tokens:
        raise DataError("there are no calibration rows to measure importance on; give at least one")
    return num_tokens


def rounded(scores: Iterable[float]) -> list[float]:
    """Scores to `SIGNIFICANT_DIGITS`.

    Raises:
        ModelError: one is not finite.
    """
    scores = list(scores)
    if not all(map(math.isfinite, scores)):
        raise ModelError("the model's weights or activations are not finite, so nothing in it can be ranked; check it")
    return [float(f"{score:.{SIGNIFICANT_DIGITS}g}") for score in scores]


def largest(scores: Sequence[float], count: int) -> list[int]:
    """Positions of the `count` largest scores, in rising order; of equal ones the first."""
    return sorted(sorted(range(len(scores)), key=lambda position: (-scores[position], position))[:count])
