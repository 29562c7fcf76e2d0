"""Activation-aware scaling: what a layer reads large values through is stored large, so that rounding harms it less.

AWQ (Lin et al. 2023, arXiv:2306.00978): the columns of the linear layers that read an activation x are multiplied by
s = mean|x|^alpha, and what writes x is divided by s. In full precision the model stays the same function. For each
place alpha is searched for least error of the layers' outputs after rounding.

The paper also cuts off large weights. With zero points that won nothing where it was measured, so it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from slmops.errors import ModelError
from slmops.quantize.checkpoint import rounded
from slmops.shaping.plan import NARROWABLE, head_dim_of

KNOWN = NARROWABLE
"""Model types whose layers write and read as `places` says."""

ALPHAS = [step / 10 for step in range(11)]
"""0 changes nothing."""
MAX_TOKENS = 512
"""Activations of at most so many tokens are kept of each place."""


@dataclass(frozen=True)
class Place:
    """One activation of C channels that linear layers read."""

    readers: list[torch.nn.Linear]
    """[*, C] they all read the same."""
    divide: Callable[[torch.Tensor], None]
    """Divides what writes the activation by [C] scales."""
    share: int = 1
    """Channels of so many heads, one behind the other, are written by one, and have one scale."""
    head_dim: int = 1


def scale(model: PreTrainedModel, batches: Sequence[torch.Tensor], bits: int, block_size: int) -> int:
    """Scale all places of `model`, in place, for weights of `bits` with a scale for each block; how many changed.

    Args:
        model: in float32.
        batches: [B, L] token ids without padding.
        bits: of the weights after rounding.
        block_size: weights of a row that share a scale.

    Raises:
        ModelError: how this architecture's layers fit together is not known.
    """
    check_known(str(model.config.model_type))
    found = list(places(model))
    activations = _observe(model, batches, [place.readers[0] for place in found])
    return sum(_scale(place, activations.pop(place.readers[0]), bits, block_size) for place in found)


def check_known(model_type: str) -> None:
    """
    Raises:
        ModelError: how the layers of these models fit together is not known.
    """
    if model_type not in KNOWN:
        raise ModelError(
            f"how the layers of a {model_type} model fit together is not known here (it is for {', '.join(KNOWN)}), so "
            "their activations cannot be scaled; use cpu-int4-gptq or cpu-int4"
        )


def places(model: PreTrainedModel) -> Iterator[Place]:
    """Every activation of the model's layers that can be scaled."""
    config = model.config
    head_dim = head_dim_of(config.to_dict())
    num_heads = config.num_attention_heads
    num_groups = getattr(config, "num_key_value_heads", None) or num_heads
    layers: Any = model.base_model.layers
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        fused = hasattr(attention, "qkv_proj")
        queries = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
        yield Place(queries, _rows(layer.input_layernorm))
        values = attention.qkv_proj if fused else attention.v_proj
        width = num_groups * head_dim
        yield Place([attention.o_proj], _rows(values, last=width), num_heads // num_groups, head_dim)
        fused = hasattr(mlp, "gate_up_proj")
        yield Place(
            [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj], _rows(layer.post_attention_layernorm)
        )
        up = mlp.gate_up_proj if fused else mlp.up_proj
        yield Place([mlp.down_proj], _rows(up, last=config.intermediate_size))


def _rows(writer: Any, last: int | None = None) -> Callable[[torch.Tensor], None]:
    """Divides a norm's weights, or the rows of a linear layer and its bias; of the `last` ones only."""

    def divide(scales: torch.Tensor) -> None:
        for tensor in (writer.weight, getattr(writer, "bias", None)):
            if tensor is not None:
                rows = tensor.data if last is None else tensor.data[-last:]
                rows.div_(scales.view(-1, *[1] * (rows.dim() - 1)))

    return divide


@torch.no_grad()
def _observe(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], readers: Sequence[torch.nn.Linear]
) -> dict[torch.nn.Module, torch.Tensor]:
    """[T, C] what each of `readers` reads, at the same tokens.

    They are drawn, each as likely as any other: every n-th would be the first of a row far too often, on which
    activations are unlike those on all others (Sun et al. 2024, arXiv:2402.17762).
    """
    num_tokens = [batch.numel() for batch in batches]
    drawn = torch.randperm(sum(num_tokens), generator=torch.Generator().manual_seed(0)) < MAX_TOKENS
    seen: dict[torch.nn.Module, list[torch.Tensor]] = {reader: [] for reader in readers}
    mask = torch.empty(0)

    def keep(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        seen[module].append(args[0].flatten(0, -2)[mask])

    hooks = [reader.register_forward_pre_hook(keep) for reader in readers]
    try:
        for batch, mask in zip(batches, torch.split(drawn, num_tokens), strict=True):
            mask = mask.to(batch.device)
            model.base_model(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {reader: torch.cat(parts) for reader, parts in seen.items()}


@torch.no_grad()
def _scale(place: Place, activations: torch.Tensor, bits: int, block_size: int) -> bool:
    """Scale one place by the best alpha; whether that is any but 0."""
    magnitude = _shared(place, activations.abs().mean(0)).clamp(min=1e-5)
    best, least = None, float("inf")
    for alpha in ALPHAS:
        scales = magnitude**alpha
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = sum(_error(reader.weight, activations, scales, bits, block_size) for reader in place.readers)
        if error < least:
            best, least = (scales if alpha else None), error
    if best is None:
        return False
    for reader in place.readers:
        reader.weight.data.mul_(best)
    place.divide(_written(place, best))
    return True


def _error(weight: torch.Tensor, activations: torch.Tensor, scales: torch.Tensor, bits: int, block_size: int) -> float:
    """Squared error of the outputs for [T, C] activations."""
    change = rounded(weight * scales, bits, block_size) / scales - weight
    return (activations @ change.T).square().sum().item()


def _shared(place: Place, channels: torch.Tensor) -> torch.Tensor:
    """[C] channels, with the mean of those that one channel writes in the place of each."""
    if place.share == 1:
        return channels
    heads = channels.view(-1, place.share, place.head_dim)
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def _written(place: Place, scales: torch.Tensor) -> torch.Tensor:
    """One of the equal scales of each channel that is written."""
    return scales.view(-1, place.share, place.head_dim)[:, 0].reshape(-1) if place.share > 1 else scales
