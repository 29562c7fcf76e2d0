"""KFP interface of merge_responses."""

from typing import List  # noqa: UP035 - KFP reads this spelling

import slmops_images as images
from kfp import dsl
from kfp.dsl import Dataset, Input, Output
from slmops_components.documented import documented

from slmops.merge_responses.config import MergeResponsesConfig


@dsl.component(base_image=images.BASE, install_kfp_package=False)
@documented(MergeResponsesConfig)
def merge_responses(
    shards: Input[List[Dataset]],  # noqa: UP006
    responses: Output[Dataset],
    min_rows: int = 1,
) -> None:
    """Join the shards of generate_responses in the order of their prompts.

    Args:
        shards: The outputs of generate_responses for each shard, collected.
        responses: Rows, logits and counts of all of them.
    """
    from pathlib import Path

    from slmops.merge_responses import config, run
    from slmops.step import paths_of, step

    with step("merge_responses"):
        sidecar = run.run(
            config.MergeResponsesConfig.pick(locals()),
            shards=paths_of(shards),
            responses=Path(responses.path),
        )
        responses.metadata.update(sidecar.metadata())
