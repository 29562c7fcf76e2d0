"""An Olive pass around onnxruntime-genai's current model builder.

Olive 0.13 brings a pass of its own, ModelBuilder, which fails with every onnxruntime-genai since 0.15 and leaves a tied
embedding in float32, most of a small model's size. This one hands Olive's settings to the builder that is installed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler
from olive.passes import Pass
from olive.passes.olive_pass import PassConfigParam
from olive.passes.pass_config import BasePassConfig


class GenAIModelBuilder(Pass):
    """Hugging Face directory → ONNX Runtime GenAI directory with weights of 4 or 8 bits."""

    failure: ClassVar[Exception | None] = None
    """Why the last run failed: Olive catches what a pass raises, and goes on without a model."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "precision": PassConfigParam(type_=str, required=True, description="int4 or int8"),
            "block_size": PassConfigParam(type_=int, default_value=32, description="weights that share a scale"),
            "algorithm": PassConfigParam(type_=str, default_value="rtn", description="rtn or k_quant"),
        }

    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        settings: Any = config
        output = Path(output_model_path)
        cache = output.with_name(output.name + ".cache")
        options = [f"algo_config={settings.algorithm}", f"block_size={settings.block_size}"]
        source = str(model.model_path)
        try:
            parsed = parse_extra_options(source, source, str(output), settings.precision, "cpu", str(cache), options)
            create_model(source, source, str(output), settings.precision, "cpu", str(cache), **parsed)
        except Exception as error:
            type(self).failure = error
            raise
        finally:
            shutil.rmtree(cache, ignore_errors=True)
        return ONNXModelHandler(str(output), onnx_file_name="model.onnx")
