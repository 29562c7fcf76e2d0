"""KFP interface of preflight."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Artifact, Output, OutputPath
from slmops_components.documented import documented

from slmops.preflight.config import PreflightConfig


# The train image: what has to know the model's architecture is the transformers that will train it.
@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
@documented(PreflightConfig)
def preflight(
    report: Output[Artifact],
    data_version: OutputPath(str),
    data_uri: str,
    base_model_uri: str,
    store_uri: str,
    same_tokenizer_uris: list[str] = [],  # noqa: B006
    teacher_endpoint: str = "none",
    require_license: bool = False,
    allowed_licenses: list[str] = [],  # noqa: B006
    min_free_disk_gib: float = 2.0,
    min_free_memory_gib: float = 1.0,
    min_gpus: int = 0,
    min_gpu_memory_gib: float = 0.0,
) -> None:
    """Check in seconds, before anything runs, that data, base model, store and machine are as the pipeline needs them.

    Args:
        report: What was found: licence and identity of the base model, sizes, space.
        data_version: Changes when the content behind data_uri does; give it to prepare_data as source_version.
    """
    from pathlib import Path

    from slmops.preflight import config, run
    from slmops.step import step

    with step("preflight"):
        sidecar = run.run(config.PreflightConfig.pick(locals()), report=Path(report.path))
        report.metadata.update(sidecar.metadata())
        Path(data_version).write_text(sidecar.facts["data_version"])
