"""A student of less width: fewer MLP channels, fewer attention heads, a narrower residual stream.

What stays is chosen by importance: mean absolute activations on calibration rows (Muralidharan et al. 2024, Minitron,
arXiv:2407.14679), or norms of weights where there are none. Channels and heads are chosen layer by layer, dimensions of
the residual stream once for the model. L layers, H hidden_size, I intermediate_size, G num_key_value_heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from slmops.errors import ModelError
from slmops.shaping.architecture import make_model, resized
from slmops.shaping.importance import Watcher, largest, observe, rounded
from slmops.shaping.layers import layers_of
from slmops.shaping.plan import NARROWABLE, head_dim_of
from slmops.training.batches import Batch

AXES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "embed_tokens": ((), ("hidden",)),
    "q_proj": (("queries",), ("hidden",)),
    "k_proj": (("keys",), ("hidden",)),
    "v_proj": (("keys",), ("hidden",)),
    "qkv_proj": (("queries", "keys", "keys"), ("hidden",)),
    "o_proj": (("hidden",), ("queries",)),
    "q_norm": ((), ()),
    "k_norm": ((), ()),
    "gate_proj": (("channels",), ("hidden",)),
    "up_proj": (("channels",), ("hidden",)),
    "gate_up_proj": (("channels", "channels"), ("hidden",)),
    "down_proj": (("hidden",), ("channels",)),
    "input_layernorm": (("hidden",), ()),
    "post_attention_layernorm": (("hidden",), ()),
    "norm": (("hidden",), ()),
    "lm_head": ((), ("hidden",)),
}
"""What the rows and columns of a module's weights are made of; several things lie one behind the other, () stays."""

RESIDUAL_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


@dataclass(frozen=True)
class WidthImportance:
    """How much each part of the width matters; compared only within one list."""

    hidden: list[float]
    """[H] one for each dimension of the residual stream."""
    channels: list[list[float]]
    """[L, I] of each layer, one for each MLP channel."""
    groups: list[list[float]]
    """[L, G] of each layer, one for each key-value head together with the query heads that share it."""


@dataclass(frozen=True)
class Width:
    """What stays of the width: positions in rising order."""

    hidden: list[int]
    channels: list[list[int]]
    groups: list[list[int]]


def measure_width(model: PreTrainedModel, layers: Sequence[int], batches: Iterable[Batch]) -> WidthImportance:
    """Mean absolute activations in `layers`, over all tokens of `batches`, in one pass.

    A channel is seen where down_proj reads it, a group where o_proj does, and a residual dimension behind every norm.

    Raises:
        ModelError: the architecture is unknown, or its activations are not finite.
        DataError: there is no token.
    """
    check_architecture(model)
    chosen = _chosen(model, layers)
    final_norm: Any = model.base_model.norm
    norms = [norm for layer in chosen for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    totals: dict[torch.nn.Module, torch.Tensor] = {}

    def add(module: torch.nn.Module, activations: torch.Tensor) -> None:
        total = activations.abs().sum(0, dtype=torch.float64)
        totals[module] = totals[module] + total if module in totals else total

    def reads(module: torch.nn.Module) -> Watcher:
        return lambda seen, made: add(module, seen)

    def writes(module: torch.nn.Module) -> Watcher:
        return lambda seen, made: add(module, made)

    watchers = {module: writes(module) for module in (*norms, final_norm)}
    watchers |= {module: reads(module) for layer in chosen for module in (layer.mlp.down_proj, layer.self_attn.o_proj)}
    num_tokens = observe(model, batches, watchers)
    mean = {module: total / num_tokens for module, total in totals.items()}
    num_groups = model.config.num_key_value_heads
    return WidthImportance(
        hidden=_listed(torch.stack([mean[norm] for norm in (*norms, final_norm)]).mean(0)),
        channels=[_listed(mean[layer.mlp.down_proj]) for layer in chosen],
        groups=[_listed(mean[layer.self_attn.o_proj].view(num_groups, -1).mean(1)) for layer in chosen],
    )


def weigh_width(model: PreTrainedModel, layers: Sequence[int]) -> WidthImportance:
    """Norms of the weights in `layers`: what is read times what is written; for the residual stream, what is written.

    Raises:
        ModelError: the architecture is unknown, or its weights are not finite.
    """
    check_architecture(model)
    chosen = _chosen(model, layers)
    num_groups = model.config.num_key_value_heads
    embedding: Any = model.get_input_embeddings()
    hidden = _norm(embedding.weight, 0) / math.sqrt(len(embedding.weight))
    channels, groups = [], []
    for layer in chosen:
        gate, up = _gate_and_up(layer.mlp)
        values, out, down = _values(layer.self_attn), layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight
        channels.append(_listed(_norm(gate, 1) * _norm(up, 1) * _norm(down, 0)))
        written = _norm(out, 0).square().view(num_groups, -1).sum(1).sqrt()
        groups.append(_listed(_norm(values.reshape(num_groups, -1), 1) * written))
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            hidden = hidden + _norm(_with_bias(module), 1) / math.sqrt(module.in_features)
    return WidthImportance(_listed(hidden), channels, groups)


def choose_width(importance: WidthImportance, sizes: Mapping[str, int]) -> Width:
    """The most important parts, as many as `sizes` says; of equal ones the first."""
    return Width(
        hidden=largest(importance.hidden, sizes["hidden_size"]),
        channels=[largest(scores, sizes["intermediate_size"]) for scores in importance.channels],
        groups=[largest(scores, sizes["num_key_value_heads"]) for scores in importance.groups],
    )


def kept_fractions(importance: WidthImportance, width: Width) -> dict[str, float]:
    """Share of the importance that stays, 0 to 1, as the mean over layers."""

    def fraction(scores: list[float], kept: list[int]) -> float:
        return sum(scores[position] for position in kept) / (sum(scores) or 1.0)

    def mean(scores: list[list[float]], kept: list[list[int]]) -> float:
        return sum(map(fraction, scores, kept)) / len(scores)

    return {
        "hidden_size": round(fraction(importance.hidden, width.hidden), 4),
        "intermediate_size": round(mean(importance.channels, width.channels), 4),
        "num_key_value_heads": round(mean(importance.groups, width.groups), 4),
    }


def narrow(model: PreTrainedModel, width: Width) -> PreTrainedModel:
    """A new model of what `width` names, with the same logits if all that goes is zero.

    Fewer residual dimensions change the mean square that an RMSNorm divides by. With H of them before and h after, the
    norms' weights times sqrt(H / h) and rms_norm_eps times H / h undo that exactly for dimensions that were zero. Norms
    of queries and keys have the same rms_norm_eps; what they read is scaled alike.

    Raises:
        ModelError: the architecture is unknown.
    """
    check_architecture(model)
    before, config = model.config.to_dict(), model.config
    head_dim, group = head_dim_of(before), config.num_attention_heads // config.num_key_value_heads
    full = {
        "hidden": config.hidden_size,
        "channels": config.intermediate_size,
        "queries": config.num_attention_heads * head_dim,
        "keys": config.num_key_value_heads * head_dim,
    }
    growth = config.hidden_size / len(width.hidden)
    changes = {
        "hidden_size": len(width.hidden),
        "intermediate_size": len(width.channels[0]),
        "num_attention_heads": len(width.groups[0]) * group,
        "num_key_value_heads": len(width.groups[0]),
        "head_dim": head_dim,
        "rms_norm_eps": config.rms_norm_eps * growth,
    }
    scaled = set(RESIDUAL_NORMS)
    if any(name.endswith("q_norm") for name, _ in model.named_modules()):
        scaled |= {"q_proj", "k_proj"}
    weights = {}
    for name, weight in model.state_dict().items():
        module = name.split(".")[-2]
        layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else 0
        weights[name] = _cut(weight, AXES[module], _kept(width, layer, head_dim, group), full)
        if module in scaled:
            weights[name] = weights[name] * math.sqrt(growth)
    student = make_model(type(model), resized(config, changes), seed=0, device="cpu")
    student.load_state_dict(weights)
    return student


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse a model whose weights mean something that is not known here.

    Raises:
        ModelError: its type or one of its modules is unknown.
    """
    strange = {name.split(".")[-2] for name in model.state_dict()} - AXES.keys()
    if model.config.model_type not in NARROWABLE or strange:
        raise ModelError(
            f"{type(model).__name__} (model_type {model.config.model_type!r}) cannot be cut to less width"
            + (f" because of its {', '.join(sorted(strange))}" if strange else "")
            + f": that is known for {', '.join(NARROWABLE)}; change only num_hidden_layers, or use fresh weights"
        )


def _kept(width: Width, layer: int, head_dim: int, group: int) -> dict[str, list[int]]:
    groups = width.groups[layer]
    per_group = group * head_dim
    return {
        "hidden": width.hidden,
        "channels": width.channels[layer],
        "queries": [number * per_group + offset for number in groups for offset in range(per_group)],
        "keys": [number * head_dim + offset for number in groups for offset in range(head_dim)],
    }


def _cut(
    weight: torch.Tensor,
    axes: tuple[tuple[str, ...], tuple[str, ...]],
    kept: Mapping[str, list[int]],
    full: Mapping[str, int],
) -> torch.Tensor:
    """The kept rows and columns of a matrix, or the kept entries of a vector (a norm's weight, a bias)."""
    for dimension, parts in enumerate(axes[: weight.dim()]):
        if parts:
            starts = [sum(full[part] for part in parts[:number]) for number in range(len(parts))]
            positions = [start + at for start, part in zip(starts, parts, strict=True) for at in kept[part]]
            weight = weight.index_select(dimension, torch.tensor(positions, device=weight.device))
    return weight


def _chosen(model: PreTrainedModel, layers: Sequence[int]) -> list[Any]:
    existing = layers_of(model)
    return [existing[number] for number in layers]


def _gate_and_up(mlp: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[I, H + 1] each, the bias as one more column."""
    if hasattr(mlp, "gate_up_proj"):
        gate, up = _with_bias(mlp.gate_up_proj).chunk(2)
        return gate, up
    return _with_bias(mlp.gate_proj), _with_bias(mlp.up_proj)


def _values(attention: Any) -> torch.Tensor:
    """[G * head_dim, H + 1] the rows that make the values."""
    if hasattr(attention, "qkv_proj"):
        size = attention.config.num_key_value_heads * attention.head_dim
        return _with_bias(attention.qkv_proj)[-size:]
    return _with_bias(attention.v_proj)


def _with_bias(linear: Any) -> torch.Tensor:
    bias = torch.zeros(len(linear.weight), device=linear.weight.device) if linear.bias is None else linear.bias
    return torch.cat([linear.weight.detach(), bias.detach()[:, None].to(linear.weight.dtype)], dim=1)


def _norm(weights: torch.Tensor, dimension: int) -> torch.Tensor:
    """Euclidean norm along `dimension`, in float64."""
    return weights.detach().float().square().sum(dimension, dtype=torch.float64).sqrt()


def _listed(scores: torch.Tensor) -> list[float]:
    return rounded(scores.tolist())
