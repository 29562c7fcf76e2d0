"""What a student is to be, and whether a model can give it, as its config.json says before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field

from slmops.config import Config
from slmops.errors import ConfigError, ModelError

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""What `shape` may name, in the words of config.json."""

NARROWABLE = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Model types whose weights can be cut to less width; what others do with theirs is not known here."""

HEADS_DIVIDE_HIDDEN_SIZE = ("llama",)
"""Model types that refuse another hidden_size than a multiple of the heads, even where head_dim is given."""

Complain = Callable[[str], None]


class StudentPlan(Config):
    """How a student comes out of a larger model."""

    weights: Literal["kept", "fresh"] = "kept"
    """`kept`: a part of the larger model's weights; `fresh`: random ones, in the same architecture."""
    shape: dict[str, int] = Field(default={})
    """Sizes by their names in config.json (`SIZES`), each 1 or more; those left out stay as they are."""
    layer_rule: Literal["spread", "first", "last", "importance"] = "spread"
    """Which layers are kept where there are fewer: even distances, the first, the last, or those that change most."""
    keep_layers: list[int] = Field(default=[])
    """Layers to keep by hand instead, counted from 0, in rising order; empty leaves it to `layer_rule`."""


def check_plan(plan: StudentPlan, model_config: Mapping[str, Any]) -> None:
    """Find every contradiction in `plan`, and between it and the larger model's config.json.

    Raises:
        ModelError: the model cannot be shaped so; the message has all complaints, those about settings too.
        ConfigError: the settings contradict each other or the model; with all complaints together.
    """
    settings: list[str] = []
    unfit: list[str] = []
    _check_names(plan, settings.append)
    _check_model(plan, model_config, unfit.append)
    _check_layers(plan, model_config, settings.append)
    _check_sizes(plan, model_config, settings.append)
    _check_heads(plan, model_config, settings.append)
    complaints = unfit + settings
    if complaints:
        message = "the student cannot be made:" + "\n  ".join(["", *complaints])
        raise (ModelError if unfit else ConfigError)(message if len(complaints) > 1 else complaints[0])


def sizes_of(model_config: Mapping[str, Any]) -> dict[str, int]:
    """Those of `SIZES` that a config.json states; as many key-value heads as heads where it does not say."""
    sizes = {name: model_config[name] for name in SIZES if isinstance(model_config.get(name), int)}
    if "num_attention_heads" in sizes:
        sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
    return sizes


def sizes_of_student(plan: StudentPlan, model_config: Mapping[str, Any]) -> dict[str, int]:
    """The student's sizes; of heads and key-value heads, the one that `shape` leaves out keeps their ratio."""
    source = sizes_of(model_config)
    sizes = source | plan.shape
    if plan.keep_layers:
        sizes["num_hidden_layers"] = len(plan.keep_layers)
    given = {"num_attention_heads", "num_key_value_heads"} & plan.shape.keys()
    if len(given) == 1 and "num_attention_heads" in source:
        group = source["num_attention_heads"] // source["num_key_value_heads"]
        if "num_attention_heads" in given:
            sizes["num_key_value_heads"] = max(1, sizes["num_attention_heads"] // group)
        else:
            sizes["num_attention_heads"] = sizes["num_key_value_heads"] * group
    return sizes


def head_dim_of(model_config: Mapping[str, Any]) -> int:
    """Size of one attention head."""
    return int(model_config.get("head_dim") or model_config["hidden_size"] // model_config["num_attention_heads"])


def head_dim_of_student(plan: StudentPlan, model_config: Mapping[str, Any]) -> int:
    """Kept weights keep it; with fresh ones it follows the sizes where it did so in the larger model."""
    head_dim = head_dim_of(model_config)
    if plan.weights == "kept" or not _head_dim_follows(model_config):
        return head_dim
    sizes = sizes_of_student(plan, model_config)
    return sizes["hidden_size"] // sizes["num_attention_heads"]


def architecture_of(model_config: Mapping[str, Any]) -> str:
    """What to call the model in an error."""
    names = model_config.get("architectures") or [model_config.get("model_type", "an unnamed architecture")]
    return str(names[0])


def _head_dim_follows(model_config: Mapping[str, Any]) -> bool:
    return bool(head_dim_of(model_config) * model_config["num_attention_heads"] == model_config["hidden_size"])


def _check_names(plan: StudentPlan, complain: Complain) -> None:
    for name, size in plan.shape.items():
        if name == "vocab_size":
            complain("vocab_size: the vocabulary cannot be changed here; the student keeps the model's tokenizer")
        elif name not in SIZES:
            complain(f"{name} is no size of a student; use {', '.join(SIZES)}")
        elif size < 1:
            complain(f"{name} must be 1 or more, got {size}")


def _check_model(plan: StudentPlan, model_config: Mapping[str, Any], complain: Complain) -> None:
    architecture, stated, kind = architecture_of(model_config), sizes_of(model_config), model_config.get("model_type")
    wanted = {name for name in plan.shape if name in SIZES} | ({"num_hidden_layers"} if plan.keep_layers else set())
    if absent := sorted(wanted - stated.keys()):
        complain(f"config.json of {architecture} states no {', '.join(absent)} as a number; use another model")
    narrower = {name for name in wanted - {"num_hidden_layers"} if plan.shape[name] != stated.get(name)}
    if plan.weights == "kept" and narrower and kind not in NARROWABLE:
        complain(
            f"{architecture} (model_type {kind!r}) cannot be cut to another {', '.join(sorted(narrower))}: that is "
            f"known for {', '.join(NARROWABLE)}; change only num_hidden_layers, or use fresh weights"
        )
    if (wanted or plan.weights == "fresh") and model_config.get("quantization_config"):
        complain(f"{architecture} holds quantized weights, which cannot be cut; use the model before it was quantized")


def _check_layers(plan: StudentPlan, model_config: Mapping[str, Any], complain: Complain) -> None:
    layers, num_layers = plan.keep_layers, sizes_of(model_config).get("num_hidden_layers")
    if not layers:
        return
    if plan.weights == "fresh":
        complain("keep_layers chooses among kept weights; with fresh ones give num_hidden_layers instead")
    if num_layers and (layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= num_layers):
        complain(f"keep_layers must be in rising order, each from 0 to {num_layers - 1}, got {layers}")
    if plan.shape.get("num_hidden_layers", len(layers)) != len(layers):
        complain(
            f"keep_layers names {len(layers)} layers, but num_hidden_layers is {plan.shape['num_hidden_layers']}; "
            "leave one of them out"
        )


def _check_sizes(plan: StudentPlan, model_config: Mapping[str, Any], complain: Complain) -> None:
    source = sizes_of(model_config)
    for name in SIZES:
        if plan.weights == "kept" and name in source and plan.shape.get(name, 0) > source[name]:
            complain(
                f"{name} is {plan.shape[name]}, but the model has only {source[name]} to keep; give at most that, or "
                "use fresh weights"
            )


def _check_heads(plan: StudentPlan, model_config: Mapping[str, Any], complain: Complain) -> None:
    source, sizes = sizes_of(model_config), sizes_of_student(plan, model_config)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    if any(name not in source or sizes[name] < 1 for name in names) or not plan.shape.keys() & set(names):
        return
    hidden_size, heads, key_value_heads = (sizes[name] for name in names)
    group = source["num_attention_heads"] // source["num_key_value_heads"]
    if plan.weights == "kept" and heads != group * key_value_heads:
        complain(
            f"num_attention_heads must be {group} times num_key_value_heads, because heads are kept in whole groups, "
            f"got {heads} and {key_value_heads}; give others, or use fresh weights"
        )
    elif heads % key_value_heads:
        complain(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {key_value_heads}")
    follows = plan.weights == "fresh" and _head_dim_follows(model_config)
    if hidden_size % heads and (follows or model_config.get("model_type") in HEADS_DIVIDE_HIDDEN_SIZE):
        complain(
            f"hidden_size must be a multiple of num_attention_heads in {architecture_of(model_config)}, got "
            f"{hidden_size} and {heads}"
        )
    elif follows:
        _check_head_dim(hidden_size // heads, model_config, complain)


def _check_head_dim(head_dim: int, model_config: Mapping[str, Any], complain: Complain) -> None:
    rope = model_config.get("rope_parameters") or model_config.get("rope_scaling") or {}
    if head_dim % 2:
        complain(f"hidden_size / num_attention_heads must be even for rotary positions, got {head_dim}")
    elif head_dim != head_dim_of(model_config) and any(isinstance(factors, list) for factors in rope.values()):
        complain(
            f"hidden_size / num_attention_heads must stay {head_dim_of(model_config)}, because "
            f"{architecture_of(model_config)} has factors for each rotary position of it, got {head_dim}"
        )
