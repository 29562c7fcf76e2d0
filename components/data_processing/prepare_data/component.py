"""KFP interface of prepare_data."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import HTML, Dataset, Output
from slmops_components.documented import documented

from slmops.prepare_data.config import PrepareDataConfig


@dsl.component(base_image=images.BASE, install_kfp_package=False)
@documented(PrepareDataConfig)
def prepare_data(
    train: Output[Dataset],
    validation: Output[Dataset],
    test: Output[Dataset],
    report: Output[HTML],
    source_uri: str,
    source_version: str = "unknown",
    layout: str = "auto",
    prompt_template: str = "{prompt}",
    completion_template: str = "{completion}",
    system_prompt: str = "",
    task: str = "chat",
    task_column: str = "task",
    pii: str = "redact",
    pii_names: bool = False,
    languages: list[str] = [],  # noqa: B006
    min_chars: int = 1,
    max_chars: int = 1_000_000,
    tokenizer_uri: str = "none",
    max_tokens: int = 1_000_000,
    near_duplicates: str = "report",
    near_duplicate_threshold: float = 0.8,
    split_by: str = "seed",
    split_column: str = "split",
    stratify_by: str = "completion",
    group_by: str = "none",
    validation_fraction: float = 0.05,
    test_fraction: float = 0.1,
    leakage: str = "remove",
    leakage_ngram: int = 13,
    max_bad_fraction: float = 0.001,
    max_rows: int = 1_000_000,
    seed: int = 0,
) -> None:
    """Turn raw rows into chat records in three splits.

    Args:
        train: Chat records to train on.
        validation: Chat records to choose by.
        test: Chat records to judge by.
        report: What was read, refused and split.
    """
    from pathlib import Path

    from slmops.prepare_data import config, run
    from slmops.step import step

    with step("prepare_data"):
        splits = run.run(
            config.PrepareDataConfig.pick(locals()),
            train=Path(train.path),
            validation=Path(validation.path),
            test=Path(test.path),
            report=Path(report.path),
        )
        train.metadata.update(splits.train.metadata())
        validation.metadata.update(splits.validation.metadata())
        test.metadata.update(splits.test.metadata())
