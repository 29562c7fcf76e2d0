"""A student of fewer layers: which to keep, and keeping them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from slmops.errors import ConfigError, ModelError
from slmops.shaping.architecture import make_model, per_layer_lists
from slmops.shaping.importance import Watcher, largest, observe, rounded
from slmops.training.batches import Batch

CHANGED_BY_USE = ("training", "gradient_checkpointing")
"""Attributes of transformers' layers that say how they run, not what they are."""


def choose_layers(rule: Literal["spread", "first", "last"], count: int, num_layers: int) -> list[int]:
    """`count` of `num_layers` layers by a rule that needs no measurement, in rising order.

    `spread` takes them at even distances, the first and the last among them; one alone is the first.
    """
    if rule == "first":
        return list(range(count))
    if rule == "last":
        return list(range(num_layers - count, num_layers))
    gaps = max(count - 1, 1)
    return [(2 * number * (num_layers - 1) + gaps) // (2 * gaps) for number in range(count)]


def important_layers(count: int, influence: Sequence[float]) -> list[int]:
    """The `count` layers of the largest `block_influence`, in rising order; of equal ones the first."""
    return largest(influence, count)


def block_influence(model: PreTrainedModel, batches: Iterable[Batch]) -> list[float]:
    """How much each layer changes its input: 1 - cosine similarity of its input and output, mean over all tokens.

    From 0 (changes nothing) to 2. This is the block influence of ShortGPT (Men et al. 2024, arXiv:2403.03853).

    Raises:
        ModelError: the architecture does not keep its layers in a list, or its activations are not finite.
        DataError: there is no token.
    """
    layers = list(layers_of(model))
    similarity = [0.0] * len(layers)

    def watcher_of(number: int) -> Watcher:
        def watch(seen: torch.Tensor, made: torch.Tensor) -> None:
            cosine = torch.nn.functional.cosine_similarity(seen.double(), made.double(), dim=-1)
            similarity[number] += cosine.sum().item()

        return watch

    num_tokens = observe(model, batches, {layer: watcher_of(number) for number, layer in enumerate(layers)})
    return rounded(1 - total / num_tokens for total in similarity)


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The list of the model's layers.

    Raises:
        ModelError: the architecture has none.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ModelError(
            f"{type(model).__name__} does not keep its layers in a list that is known here, so they cannot be chosen, "
            "measured or thinned out; use a model of another family, such as Llama or Qwen"
        )
    return layers


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Drop all layers of `model` but `layers`, in place; an empty list keeps all.

    Raises:
        ConfigError: a layer does not exist, or the list is not in rising order.
        ModelError: the architecture does not keep its layers in a list, or its config cannot describe these.
    """
    if not layers:
        return
    existing = layers_of(model)
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= len(existing):
        raise ConfigError(
            f"keep_layers must be in rising order, each from 0 to {len(existing) - 1}, got {list(layers)}"
        )
    if len(layers) == len(existing):
        return
    kept = [existing[number] for number in layers]
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
    model.base_model.layers = torch.nn.ModuleList(kept)
    _describe(model.config, layers)
    _check_description(model)


def _describe(config: Any, layers: Sequence[int]) -> None:
    """Have `config` say what it said of `layers`, and nothing of the others."""
    lists = per_layer_lists(config)
    config.num_hidden_layers = len(layers)
    for name, values in lists.items():
        setattr(config, name, [values[number] for number in layers])
    if isinstance(getattr(config, "max_window_layers", None), int):
        config.max_window_layers = sum(number < config.max_window_layers for number in layers)


def _check_description(model: PreTrainedModel) -> None:
    """Compare the layers with those that the config makes when the saved model is loaded again.

    Architectures differ in how their configs speak of single layers; one that cannot be cut so shows it here.

    Raises:
        ModelError: they are not the same.
    """
    described = make_model(type(model), copy.deepcopy(model.config), seed=0, device="meta")
    ours, theirs = (
        {
            (name, what): value
            for name, module in layers_of(each).named_modules()
            for what, value in [*_settings(module), *((key, weight.shape) for key, weight in _weights(module))]
        }
        for each in (model, described)
    )
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise ModelError(
                f"the config of {type(model).__name__} cannot describe a model of these layers: layer {key[0]} would "
                f"come back with another {key[1]}; choose other layers, or keep all"
            )


def _settings(module: torch.nn.Module) -> Iterable[tuple[str, Any]]:
    plain = (bool, int, float, str, type(None))
    return (
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, plain) and not name.startswith("_") and name not in CHANGED_BY_USE
    )


def _weights(module: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return module.named_parameters(recurse=False)
