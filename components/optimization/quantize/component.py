"""KFP interface of quantize."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output
from slmops_components.documented import documented

from slmops.quantize.config import QuantizeConfig


@dsl.component(base_image=images.OPTIMIZE, install_kfp_package=False)
@documented(QuantizeConfig)
def quantize(
    model: Input[Model],
    quantized: Output[Artifact],
    calibration: Input[Dataset] = None,
    variants: list[str] = ["cpu-int4"],  # noqa: B006
    device_classes: dict = {},  # noqa: B006
    block_size: int = 32,
    block_sizes: list[int] = [],  # noqa: B006
    head_bits: int = 4,
    accept_adapters: bool = False,
    context_length: int = 1024,
    model_name: str = "slmops",
    drift_budget: float = 0.01,
    calibration_rows: int = 128,
    calibration_max_length: int = 512,
) -> None:
    """Build variants of a model that are small and fast, each for the runtime of its devices.

    Args:
        model: The model to quantize, a Hugging Face directory.
        quantized: One directory per variant.
        calibration: Chat records of the task, for variants that are calibrated and for measuring drift.
    """
    from pathlib import Path

    from slmops.quantize import config, run
    from slmops.step import path_of, step

    with step("quantize"):
        sidecar = run.run(
            config.QuantizeConfig.pick(locals()),
            model=Path(model.path),
            variants=Path(quantized.path),
            calibration=path_of(calibration),
        )
        quantized.metadata.update(sidecar.metadata())
