"""The memory that no model can go below: the same process, tokenizer and runtime around a model without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
from onnx import TensorProto, helper

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def write_empty_model(variant: Path, directory: Path) -> None:
    """Write an ONNX Runtime GenAI directory with the tokenizer of `variant` and a model that holds nothing.

    Its logits are zero for every token but the last one of the vocabulary, which it answers until it is stopped.
    """
    directory.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (variant / name).exists():
            shutil.copy(variant / name, directory / name)
    settings = json.loads((variant / "genai_config.json").read_text())
    decoder = settings["model"]["decoder"]
    decoder |= {"filename": "model.onnx", "num_hidden_layers": 1, "num_key_value_heads": 1, "head_size": 1}
    (directory / "genai_config.json").write_text(json.dumps(settings))
    in_place = settings["search"].get("past_present_share_buffer", False)
    onnx.save(_empty_decoder(settings["model"]["vocab_size"], in_place), directory / "model.onnx")


def _empty_decoder(vocab_size: int, in_place: bool) -> onnx.ModelProto:
    """input_ids [B, S] and a cache [B, 1, P, 1] → logits [B, S, V] and the cache: grown by S, or as it is."""
    integers = ["input_ids", "attention_mask"]
    caches = [("past_key_values.0.key", "present.0.key"), ("past_key_values.0.value", "present.0.value")]
    shape: list[str | int | None] = ["batch", 1, "past", 1]
    nodes = [
        helper.make_node("Unsqueeze", ["input_ids", "last_axis"], ["ids_column"]),
        helper.make_node("Equal", ["ids_column", "vocabulary"], ["never"]),
        helper.make_node("Equal", ["vocabulary", "answer"], ["chosen"]),
        helper.make_node("Or", ["never", "chosen"], ["any"]),
        helper.make_node("Cast", ["any"], ["logits"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["input_ids"], ["new"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["new", "cache_axes"], ["new_cache"]),
    ]
    for past, present in caches:
        grown = helper.make_node("Concat", [past, "new_cache"], [present], axis=2)
        nodes.append(helper.make_node("Identity", [past], [present]) if in_place else grown)
    constants = [
        helper.make_tensor("last_axis", TensorProto.INT64, [1], [2]),
        helper.make_tensor("cache_axes", TensorProto.INT64, [2], [1, 3]),
        helper.make_tensor("vocabulary", TensorProto.INT64, [vocab_size], range(-vocab_size, 0)),
        helper.make_tensor("answer", TensorProto.INT64, [1], [-1]),
    ]
    graph = helper.make_graph(
        nodes,
        "empty",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in integers]
        + [helper.make_tensor_value_info(past, TensorProto.FLOAT, shape) for past, _ in caches],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", vocab_size])]
        + [
            helper.make_tensor_value_info(present, TensorProto.FLOAT, ["batch", 1, "total", 1]) for _, present in caches
        ],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
