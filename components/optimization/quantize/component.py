"""KFP interface of quantize."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Artifact, Input, Model, Output
from slmops_components.documented import documented

from slmops.quantize.config import QuantizeConfig


@dsl.component(base_image=images.OPTIMIZE, install_kfp_package=False)
@documented(QuantizeConfig)
def quantize(
    model: Input[Model],
    quantized: Output[Artifact],
    variants: list[str] = ["cpu-int4"],  # noqa: B006
    block_size: int = 32,
    algorithm: str = "rtn",
) -> None:
    """Build ONNX Runtime GenAI variants of a model.

    Args:
        model: The model to quantize, a Hugging Face directory.
        quantized: One directory per variant.
    """
    from pathlib import Path

    from slmops.quantize import config, run
    from slmops.step import step

    with step("quantize"):
        sidecar = run.run(
            config.QuantizeConfig.pick(locals()),
            model=Path(model.path),
            variants=Path(quantized.path),
        )
        quantized.metadata.update(sidecar.metadata())
