"""KFP interface of compare."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import HTML, Artifact, Input, Metrics, Model, Output
from slmops_components.documented import documented

from slmops.compare.config import CompareConfig


@dsl.component(base_image=images.BASE, install_kfp_package=False)
@documented(CompareConfig)
def compare(
    teacher: Input[Artifact],
    distilled: Input[Artifact],
    comparison: Output[Artifact],
    report: Output[HTML],
    metrics: Output[Metrics],
    untrained: Input[Artifact] = None,
    labels_only: Input[Artifact] = None,
    model: Input[Model] = None,
    num_resamples: int = 10_000,
    confidence_level: float = 0.95,
    seed: int = 0,
    max_examples: int = 4,
) -> None:
    """Show what distillation added, by evaluations of several models on the same rows.

    Args:
        teacher: The teacher's evaluation.
        distilled: The distilled student's evaluation.
        untrained: The evaluation of the student before any training.
        labels_only: The evaluation of a student that was trained on labels alone.
        model: The distilled student, to be sure that it is the one that was evaluated.
        comparison: Accuracies, differences and their intervals.
        report: All of it, for people.
        metrics: The same figures for the dashboard.
    """
    from pathlib import Path

    from slmops.compare import config, run
    from slmops.step import path_of, step

    with step("compare"):
        sidecar = run.run(
            config.CompareConfig.pick(locals()),
            teacher=Path(teacher.path),
            distilled=Path(distilled.path),
            comparison=Path(comparison.path),
            report=Path(report.path),
            untrained=path_of(untrained),
            labels_only=path_of(labels_only),
            model=path_of(model),
        )
        comparison.metadata.update(sidecar.metadata())
        metrics.metadata.update(sidecar.write_metrics(Path(metrics.path)))
