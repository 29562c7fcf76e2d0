"""Making a student out of a larger model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from slmops.errors import ConfigError, ModelError


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Drop all layers of `model` but `layers`, in place; an empty list keeps all.

    Raises:
        ConfigError: a layer does not exist, or the list is not in rising order.
        ModelError: the architecture does not keep its layers in a list.
    """
    if not layers:
        return
    decoder = model.base_model
    existing = getattr(decoder, "layers", None)
    if not isinstance(existing, torch.nn.ModuleList):
        raise ModelError(f"{type(model).__name__} has no list of layers to choose from; leave keep_layers empty")
    if list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= len(existing):
        raise ConfigError(
            f"keep_layers must be in rising order, each from 0 to {len(existing) - 1}, got {list(layers)}"
        )
    kept = [existing[number] for number in layers]
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
    decoder.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[number] for number in layers]
