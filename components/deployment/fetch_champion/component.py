"""KFP interface of fetch_champion."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Artifact, Output
from slmops_components.documented import documented

from slmops.fetch_champion.config import FetchChampionConfig


@dsl.component(base_image=images.OPTIMIZE, install_kfp_package=False)
@documented(FetchChampionConfig)
def fetch_champion(
    champion: Output[Artifact],
    store_uri: str,
    channel: str = "default",
) -> None:
    """Fetch the model that a channel's nodes run now, to hold a new one against it. Never take it from a cache.

    Args:
        champion: What a node like this machine takes of the channel's release, as variant `champion`, or why nothing.
    """
    from pathlib import Path

    from slmops.fetch_champion import config, run
    from slmops.step import step

    with step("fetch_champion"):
        sidecar = run.run(config.FetchChampionConfig.pick(locals()), champion=Path(champion.path))
        champion.metadata.update(sidecar.metadata())
