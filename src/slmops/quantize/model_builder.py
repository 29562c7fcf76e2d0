"""An Olive pass around onnxruntime-genai's current model builder.

Olive 0.13 brings a pass of its own, ModelBuilder, which fails with every onnxruntime-genai since 0.15 and leaves a tied
embedding in float32, most of a small model's size. This one hands Olive's settings to the builder that is installed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler
from olive.passes import Pass
from olive.passes.olive_pass import PassConfigParam
from olive.passes.pass_config import BasePassConfig

HEAD_NODE = "/lm_head/MatMulNBits"
HEAD_SCALES = ("lm_head.MatMulNBits.scales", "lm_head.MatMulNBits.qzeros")
"""The builder's names for a head that comes quantized."""


class GenAIModelBuilder(Pass):
    """Hugging Face directory, quantized by Olive or not yet → ONNX Runtime GenAI directory."""

    failure: ClassVar[Exception | None] = None
    """Why the last run failed: Olive catches what a pass raises, and goes on without a model."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "precision": PassConfigParam(type_=str, required=True, description="int4 or fp16"),
            "execution_provider": PassConfigParam(type_=str, default_value="cpu", description="cpu or cuda"),
            "block_size": PassConfigParam(type_=int, default_value=32, description="weights that share a scale"),
            "algorithm": PassConfigParam(type_=str, default_value="rtn", description="rtn or k_quant"),
            "head_bits": PassConfigParam(type_=int, default_value=4, description="bits of the head: 4 or 8"),
            "tied": PassConfigParam(
                type_=bool, default_value=False, description="whether embedding and head are one matrix"
            ),
        }

    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        settings: Any = config
        try:
            _build(Path(model.model_path), Path(output_model_path), settings)
        except Exception as error:
            type(self).failure = error
            raise
        return ONNXModelHandler(output_model_path, onnx_file_name="model.onnx")


def _build(source: Path, output: Path, settings: Any) -> None:
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    options = [f"algo_config={settings.algorithm}", f"block_size={settings.block_size}"]
    if settings.head_bits == 8:
        options.append("matmul_mixed_precision=last_matmul:int8")
    if settings.tied:
        _tie(source / "config.json")
    cache = output.with_name(output.name + ".cache")
    given = (str(source), str(source), str(output), settings.precision, settings.execution_provider, str(cache))
    try:
        create_model(*given, **parse_extra_options(*given, options))
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    if settings.tied:
        _shape_like_embedding(output / "model.onnx")


def _tie(config_file: Path) -> None:
    """Say again that embedding and head are one: Olive unties them to quantize the head, and the builder then keeps
    the embedding in float32. With this it reads the embedding out of the quantized head."""
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"tie_word_embeddings": True}))


def _shape_like_embedding(file: Path) -> None:
    """Give a head that Olive quantized one row for each token: its MatMulNBits takes its scales in any shape, and the
    builder writes them flat, but the embedding that shares them does not load so."""
    import onnx

    graph = onnx.load(file, load_external_data=False)
    rows = {
        node.name: onnx.helper.get_node_attr_value(node, "N") for node in graph.graph.node if node.name == HEAD_NODE
    }
    for tensor in graph.graph.initializer:
        if rows and tensor.name in HEAD_SCALES and len(tensor.dims) == 1:
            num_rows = rows[HEAD_NODE]
            tensor.dims[:] = [num_rows, tensor.dims[0] // num_rows]
    onnx.save(graph, file)
