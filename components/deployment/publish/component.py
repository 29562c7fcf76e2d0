"""KFP interface of publish."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Artifact, Input, Output
from slmops_components.documented import documented

from slmops.publish.config import PublishConfig


@dsl.component(base_image=images.BASE, install_kfp_package=False)
@documented(PublishConfig)
def publish(
    variants: Input[Artifact],
    verdict: Input[Artifact],
    release: Output[Artifact],
    store_uri: str,
    channel: str = "default",
) -> None:
    """Publish a release that passed the gate.

    Args:
        variants: The output of quantize.
        verdict: The verdict of the gate; anything but `pass` is refused.
        release: Digest, channel and address of the release.
    """
    from pathlib import Path

    from slmops.publish import config, run
    from slmops.step import step

    with step("publish"):
        sidecar = run.run(
            config.PublishConfig.pick(locals()),
            variants=Path(variants.path),
            verdict=Path(verdict.path),
            release=Path(release.path),
        )
        release.metadata.update(sidecar.metadata())
