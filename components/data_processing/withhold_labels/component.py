"""KFP interface of withhold_labels."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Dataset, Input, Output
from slmops_components.documented import documented

from slmops.withhold_labels.config import WithholdLabelsConfig


@dsl.component(base_image=images.BASE, install_kfp_package=False)
@documented(WithholdLabelsConfig)
def withhold_labels(
    rows: Input[Dataset],
    labelled: Output[Dataset],
    prompts: Output[Dataset],
    rows_per_class: int = 10,
    no_label: str = "?",
) -> None:
    """Keep the labels of a few rows of each class, and make prompts of all rows.

    Args:
        rows: Chat records whose answers are labels.
        labelled: The few, to fine-tune a teacher on.
        prompts: All rows, for the teacher to answer; those that are not labelled hide their label.
    """
    from pathlib import Path

    from slmops.step import step
    from slmops.withhold_labels import config, run

    with step("withhold_labels"):
        sidecars = run.run(
            config.WithholdLabelsConfig.pick(locals()),
            rows=Path(rows.path),
            labelled=Path(labelled.path),
            prompts=Path(prompts.path),
        )
        labelled.metadata.update(sidecars[0].metadata())
        prompts.metadata.update(sidecars[1].metadata())
