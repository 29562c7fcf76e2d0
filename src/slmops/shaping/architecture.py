"""One architecture in other sizes: its config, and a model that transformers makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from slmops.errors import ModelError

NOT_OF_LAYERS = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id")
"""Lists in a config that may be as long as the model is deep by chance."""


def per_layer_lists(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """The lists in `config` that have one entry for each layer (layer_types, no_rope_layers), by name."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers and name not in NOT_OF_LAYERS
    }


def resized(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """`config` with `changes`; what it says of each layer begins again behind the last one where there are more.

    Raises:
        ModelError: transformers refuses these sizes for this architecture.
    """
    settings = config.to_dict() | dict(changes)
    for name, values in per_layer_lists(config).items():
        settings[name] = [values[number % len(values)] for number in range(settings["num_hidden_layers"])]
    try:
        result: PreTrainedConfig = type(config).from_dict(settings)
    except (StrictDataclassError, ValueError) as error:
        raise ModelError(
            f"{config.model_type} cannot have the sizes {dict(changes)}: {str(error).splitlines()[-1].strip()}"
        ) from error
    result._attn_implementation = config._attn_implementation
    return result


def make_model(kind: type[PreTrainedModel], config: PreTrainedConfig, *, seed: int, device: str) -> PreTrainedModel:
    """A new model with transformers' own random weights, in float32; on the device `meta`, one without any weights.

    Raises:
        ModelError: transformers cannot make it.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            return kind(config)
    except (StrictDataclassError, ValueError, IndexError) as error:
        raise ModelError(f"transformers cannot make a {kind.__name__} of these sizes: {error}") from error
