"""KFP interface of prune."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output
from slmops_components.documented import documented

from slmops.prune.config import PruneConfig


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
@documented(PruneConfig)
def prune(
    model: Input[Model],
    calibration: Input[Dataset],
    pruned: Output[Model],
    metrics: Output[Metrics],
    shape: dict = {},  # noqa: B006
    layer_rule: str = "importance",
    keep_layers: list[int] = [],  # noqa: B006
    sparsity: str = "none",
    sparsity_fraction: float = 0.5,
    vocabulary: str = "kept",
    min_vocab_size: int = 4096,
    vocab_multiple: int = 64,
    max_calibration_rows: int = 256,
    max_length: int = 512,
    micro_batch_size: int = 16,
) -> None:
    """Cut layers, width and vocabulary of a model, or set weights to zero; nothing is trained.

    Args:
        model: The model to prune, a Hugging Face directory.
        calibration: Chat records that importance is measured on, and whose tokens stay; the training rows, say.
        pruned: What is left of it.
        metrics: Parameters and tokens before and after.
    """
    from pathlib import Path

    from slmops.prune import config, run
    from slmops.step import step

    with step("prune"):
        sidecar = run.run(
            config.PruneConfig.pick(locals()),
            model=Path(model.path),
            calibration=Path(calibration.path),
            pruned=Path(pruned.path),
        )
        pruned.metadata.update(sidecar.metadata())
        metrics.metadata.update(sidecar.write_metrics(Path(metrics.path)))
