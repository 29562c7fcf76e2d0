"""KFP interface of evaluate."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Artifact, ClassificationMetrics, Dataset, Input, Metrics, Model, Output
from slmops_components.documented import documented

from slmops.evaluate.config import EvaluateConfig


@dsl.component(base_image=images.OPTIMIZE, install_kfp_package=False)
@documented(EvaluateConfig)
def evaluate(
    model: Input[Artifact],
    test: Input[Dataset],
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
    confusion: Output[ClassificationMetrics],
    reference: Input[Model] = None,
    safety: Input[Dataset] = None,
    variant: str = "full_precision",
    match: str = "exact",
    task_settings: dict = {},  # noqa: B006
    max_rows: int = 1_000_000,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    dtype: str = "float32",
    drift_rows: int = 64,
    layer_drift_rows: int = 0,
    num_injections: int = 16,
) -> None:
    """Measure what a model answers on held-out rows.

    Args:
        model: A Hugging Face directory, or the output of quantize or of fetch_champion.
        test: Chat records that the model was not trained on.
        reference: The model in full precision that a variant was made from, to measure how far it has moved.
        safety: Chat records whose answers count apart: what must be refused, what must not be said.
        evaluation: Accuracy, overlap with the references, calibration, perplexity and every prediction.
        metrics: The same figures for the dashboard.
        confusion: How often each reference answer got which answer, for tasks with few different answers.
    """
    from pathlib import Path

    from slmops.evaluate import config, run
    from slmops.step import path_of, step

    with step("evaluate"):
        sidecar = run.run(
            config.EvaluateConfig.pick(locals()),
            model=Path(model.path),
            test=Path(test.path),
            evaluation=Path(evaluation.path),
            reference=path_of(reference),
            safety=path_of(safety),
        )
        evaluation.metadata.update(sidecar.metadata())
        metrics.metadata.update(sidecar.write_metrics(Path(metrics.path)))
        confusion.log_confusion_matrix(*run.write_confusion_matrix(Path(evaluation.path), Path(confusion.path)))
