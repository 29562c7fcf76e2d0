"""Checkpoints in Olive's quantized format: `name.qweight`, `.scales` and `.qzeros` in place of `name.weight`.

qweight is [out, in * bits / 8] bytes, scales [out, blocks], qzeros [out, blocks * bits / 8] bytes, rounded up; packed
along the last dimension, lowest bits first. All have zero points here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from olive.common.quant.utils import WeightQuantizer, pack_to_uint8, unpack_from_uint8
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slmops import models
from slmops.errors import ModelError

PARTS = ("qweight", "scales", "qzeros")
RAISED_BITS = 8


def weight_files(model: Path) -> list[Path]:
    """The files with weights of a Hugging Face directory."""
    return sorted(model.glob("*.safetensors"))


def check_finite(model: Path) -> None:
    """
    Raises:
        ModelError: a weight is not a number, or infinite; with the tensor's name.
    """
    for file in weight_files(model):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dict
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
                    raise ModelError(
                        f"{file}: {name} has {int((~finite).sum()):,} weights that are not finite, so nothing that is "
                        "made of it can run; train the model again with a lower learning rate"
                    )


def dequantized(checkpoint: Path) -> dict[str, torch.Tensor]:
    """[out, in] weights in float32 of all quantized modules, by the module's name."""
    settings = models.read_config(checkpoint)["quantization_config"]
    tensors = _load(checkpoint)
    found = {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        if part == "qweight":
            bits, block_size = _bits(settings, name), settings["group_size"]
            packed, scales, zeros = (tensors[f"{name}.{part}"] for part in PARTS)
            shape = (packed.shape[0], packed.shape[1] * 8 // bits)
            quantizer = WeightQuantizer(bits=bits, symmetric=False, group_size=block_size)
            found[name] = quantizer.dequantize(
                unpack_from_uint8(packed, bits, shape), scales, unpack_from_uint8(zeros, bits, tuple(scales.shape))
            ).float()
    return found


def rounded(weight: torch.Tensor, bits: int, block_size: int) -> torch.Tensor:
    """[out, in] weights rounded to the nearest of a grid with a scale and a zero point for each block of a row."""
    quantizer = WeightQuantizer(bits=bits, symmetric=False, group_size=block_size)
    result: torch.Tensor = quantizer.fake_quantize(weight)
    return result


def raise_bits(checkpoint: Path, originals: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
    """Store the modules `names` in 8 bits, rounded from their `originals`, in place."""
    tensors = _load(checkpoint)
    config = models.read_config(checkpoint)
    settings: dict[str, Any] = config["quantization_config"]
    overrides = dict(settings.get("overrides") or {})
    quantizer = WeightQuantizer(bits=RAISED_BITS, symmetric=False, group_size=settings["group_size"])
    for name in names:
        weight = originals[name]
        scales, zeros = quantizer.find_qparams(weight)
        tensors[f"{name}.qweight"] = pack_to_uint8(quantizer.quantize(weight, scales, zeros), RAISED_BITS)
        tensors[f"{name}.scales"] = scales.contiguous()
        tensors[f"{name}.qzeros"] = pack_to_uint8(zeros, RAISED_BITS)
        overrides[name] = overrides.get(name, {}) | {"bits": RAISED_BITS}
    config["quantization_config"] = settings | {"overrides": overrides}
    _save(checkpoint, tensors, config)


def split_fused(checkpoint: Path) -> None:
    """Give each of Phi-3's fused projections a name of its own, in place.

    onnxruntime-genai 0.18 cuts the zero points of a fused projection at the wrong rows.
    """
    config = models.read_config(checkpoint)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    queries = config["num_attention_heads"] * head_dim
    keys = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head_dim
    rows = {
        "qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": {"gate_proj": config["intermediate_size"], "up_proj": config["intermediate_size"]},
    }
    tensors = _load(checkpoint)
    for key in list(tensors):
        path, _, part = key.rpartition(".")
        parent, _, module = path.rpartition(".")
        if module in rows:
            pieces = torch.split(tensors.pop(key), list(rows[module].values()))
            for name, piece in zip(rows[module], pieces, strict=True):
                tensors[f"{parent}.{name}.{part}"] = piece.contiguous()
    settings = config["quantization_config"]
    overrides: dict[str, Any] = {}
    for path, override in (settings.get("overrides") or {}).items():
        parent, _, module = path.rpartition(".")
        overrides |= {f"{parent}.{name}": override for name in rows.get(module, [module])}
    config["quantization_config"] = settings | {"overrides": overrides}
    _save(checkpoint, tensors, config)


def _bits(settings: Mapping[str, Any], name: str) -> int:
    return int((settings.get("overrides") or {}).get(name, {}).get("bits", settings["bits"]))


def _load(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(checkpoint) for name, tensor in load_file(file).items()}


def _save(checkpoint: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for file in (*weight_files(checkpoint), checkpoint / models.WEIGHTS_INDEX):
        file.unlink(missing_ok=True)
    save_file(tensors, checkpoint / models.WEIGHTS, metadata={"format": "pt"})
    (checkpoint / "config.json").write_text(json.dumps(config))
