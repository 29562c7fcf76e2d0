"""LoRA adapters that the runtime switches at request time, over one loaded variant (Hu et al. 2021, arXiv:2106.09685).

A variant that accepts adapters has two more inputs for each of its layers' matrix products, A [in, r] and B [r, out],
and adds x·A·B to what the product gives. They are empty by default (r = 0), so the variant answers as before; the
runtime fills them from an `.onnx_adapter` file. Adapters of all ranks fit.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors import SafetensorError
from safetensors.torch import load_file

from slmops.errors import ArtifactError, ModelError, explain_os_errors

GRAPH = "model.onnx"
PRODUCT = re.compile(r"^/model/(layers\.\d+)/(attn|mlp)/(\w+)/MatMul")
"""Names of the nodes that may have adapters: layer, block, projection."""
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections that a graph may multiply at once, and what they are made of, one behind the other."""
TENSOR = re.compile(r"^base_model\.model\.model\.(layers\.\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])\.weight$")
"""Names of PEFT's tensors."""

UNKNOWN_KINDS = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "lora_bias")
"""Settings of PEFT's that make an adapter more than A and B of one scale."""

Pair = dict[str, NDArray[np.float32]]
"""`A` [r, in] and `B` [out, r], as PEFT keeps them but for their type."""


def accept_adapters(directory: Path) -> int:
    """Let a variant for ONNX Runtime GenAI take adapters, in place; for how many matrix products.

    Only the graph changes: the file with the weights stays as it is.

    Raises:
        ModelError: there is no matrix product that an adapter could change, or it takes adapters already.
    """
    model = onnx.load(str(directory / GRAPH), load_external_data=False)
    graph = model.graph
    if any(value.name.endswith(".lora_A") for value in graph.input):
        raise ModelError(f"{directory} takes adapters already")
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "MatMulNBits" or not PRODUCT.match(node.name):
            continue
        count += 1
        name = _name(node.name)
        rows, columns = _shape(node)
        rank = f"rank_{count}"
        shapes: list[tuple[str, list[str | int | None], tuple[int, int]]] = [
            ("A", [rows, rank], (rows, 0)),
            ("B", [rank, columns], (0, columns)),
        ]
        for part, shape, empty in shapes:
            graph.input.append(helper.make_tensor_value_info(f"{name}.lora_{part}", TensorProto.FLOAT, shape))
            nothing = np.zeros(empty, np.float32)
            graph.initializer.append(numpy_helper.from_array(nothing, f"{name}.lora_{part}"))
        output, node.output[0] = node.output[0], f"{node.name}/without_adapter"
        nodes += [
            helper.make_node("MatMul", [node.input[0], f"{name}.lora_A"], [f"{name}.low"], f"{node.name}/lora_A"),
            helper.make_node("MatMul", [f"{name}.low", f"{name}.lora_B"], [f"{name}.high"], f"{node.name}/lora_B"),
            helper.make_node("Add", [node.output[0], f"{name}.high"], [output], f"{node.name}/lora_Add"),
        ]
    if not count:
        raise ModelError(f"{directory / GRAPH} has no matrix product that an adapter could change")
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(directory / GRAPH))
    return count


def write_adapter(adapter: Path, directory: Path, file: Path) -> None:
    """Write PEFT's LoRA `adapter` directory as an `.onnx_adapter` file for a variant that accepts adapters.

    The file is there whole or not at all.

    Raises:
        ArtifactError: `adapter` is no directory of PEFT's, or damaged.
        ModelError: the adapter is of a kind that cannot be switched, or not of this model.
    """
    scale, pairs = _read(adapter)
    parameters: dict[str, Any] = {}
    graph = onnx.load(str(directory / GRAPH), load_external_data=False).graph
    for node in graph.node:
        if node.op_type == "MatMulNBits" and PRODUCT.match(node.name):
            parameters |= _parameters(node, pairs, scale, adapter)
    if pairs:
        raise ModelError(f"{adapter} changes {min(pairs)}, which {directory} does not have; give this model's adapter")
    if not {value.name for value in graph.input} >= parameters.keys():
        raise ModelError(f"{directory} takes no adapters; build it with accept_adapters=true")
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in parameters.items()})
    partial = file.with_name(f"{file.name}.partial")
    with explain_os_errors(file):
        form.export_adapter(str(partial))
        os.replace(partial, file)


def _read(adapter: Path) -> tuple[float, dict[str, Pair]]:
    """The scale of all products, and A and B by the name of the projection."""
    config_file, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if not config_file.is_file() or not weights.is_file():
        raise ArtifactError(f"{adapter} has no {config_file.name} and {weights.name}; give what PEFT saved")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        rank = int(config["r"])
        scale = float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        tensors = load_file(weights)
    except (ValueError, LookupError, TypeError, ArithmeticError, SafetensorError) as error:
        raise ArtifactError(f"{adapter} is damaged ({error!r:.200}); save the adapter again") from None
    _check_kind(config, adapter)
    return scale, _pairs(tensors, adapter)


def _check_kind(config: Mapping[str, Any], adapter: Path) -> None:
    strange = [name for name in UNKNOWN_KINDS if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or strange:
        what = ", ".join(strange) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise ModelError(f"{adapter} is no plain LoRA adapter ({what}), so it cannot be switched; merge it instead")


def _pairs(tensors: Mapping[str, torch.Tensor], adapter: Path) -> dict[str, Pair]:
    """A and B by the name of the projection, such as `layers.0.mlp.up_proj`."""
    pairs: dict[str, Pair] = {}
    for key, tensor in tensors.items():
        found = TENSOR.match(key)
        if not found:
            raise ModelError(f"{adapter} changes {key}, which cannot be switched: only linear layers in layers can")
        if not tensor.isfinite().all():
            raise ModelError(f"{adapter} has weights in {key} that are not finite; train it with a lower learning rate")
        layer, block, projection, part = found.groups()
        pairs.setdefault(f"{layer}.{block.removeprefix('self_')}.{projection}", {})[part] = tensor.float().numpy()
    if half := [name for name, pair in pairs.items() if len(pair) < 2]:
        raise ArtifactError(f"{adapter} has only one of lora_A and lora_B for {min(half)}; save the adapter again")
    return pairs


def _parameters(node: onnx.NodeProto, pairs: dict[str, Pair], scale: float, adapter: Path) -> dict[str, NDArray[Any]]:
    """What one product takes; its projections are taken out of `pairs`. Empty where it has no adapter."""
    rows, columns = _shape(node)
    name = _name(node.name)
    place, _, projection = name.rpartition(".")
    parts = [name] if name in pairs else [f"{place}.{part}" for part in PACKED.get(projection, ())]
    found = {part: pairs.pop(part) for part in parts if part in pairs}
    if not found:
        return {}
    if len(found) < len(parts):
        raise ModelError(f"{adapter} changes {', '.join(found)} alone, and the runtime multiplies {name} at once")
    low = np.concatenate([pair["A"].T for pair in found.values()], axis=1)
    high = np.zeros((low.shape[1], sum(len(pair["B"]) for pair in found.values())), np.float32)
    if low.shape[0] != rows or high.shape[1] != columns:
        raise ModelError(
            f"{adapter} changes {name} of {low.shape[0]} by {high.shape[1]} weights, and the model's has {rows} by "
            f"{columns}; give this model's adapter"
        )
    row = column = 0
    for pair in found.values():  # each reads its own part of A's product
        part = pair["B"].T * np.float32(scale)
        high[row : row + part.shape[0], column : column + part.shape[1]] = part
        row, column = row + part.shape[0], column + part.shape[1]
    return {f"{name}.lora_A": np.ascontiguousarray(low), f"{name}.lora_B": high}


def _name(node: str) -> str:
    found = PRODUCT.match(node)
    return ".".join(found.groups()) if found else node


def _shape(node: onnx.NodeProto) -> tuple[int, int]:
    """[in, out] of a product's weights."""
    return helper.get_node_attr_value(node, "K"), helper.get_node_attr_value(node, "N")
