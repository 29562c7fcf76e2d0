"""KFP interface of lm_evaluate."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Artifact, Input, Metrics, Output
from slmops_components.documented import documented

from slmops.lm_evaluate.config import LmEvaluateConfig


@dsl.component(base_image=images.OPTIMIZE, install_kfp_package=False)
@documented(LmEvaluateConfig)
def lm_evaluate(
    lm_evaluation: Output[Artifact],
    metrics: Output[Metrics],
    tasks: list[str],
    model: Input[Artifact] = None,
    task_files: Input[Artifact] = None,
    target: str = "model",
    variant: str = "full_precision",
    fewshot: str = "task",
    num_fewshot: int = 0,
    max_rows: int = 1_000_000,
    max_length: int = 2048,
    max_new_tokens: int = 256,
    apply_chat_template: bool = False,
    batch_size: int = 8,
    dtype: str = "float32",
    endpoint_url: str = "http://localhost:8000/v1",
    endpoint_model: str = "default",
    endpoint_api: str = "chat",
    endpoint_tokenizer: str = "served",
    max_in_flight: int = 16,
    request_timeout_s: float = 600.0,
    max_retries: int = 8,
    allow_code: bool = False,
    seed: int = 0,
) -> None:
    """Let a model do tasks of lm-evaluation-harness.

    Args:
        lm_evaluation: lm_eval's results, every sample, and each figure with its standard error.
        metrics: The same figures for the dashboard.
        model: A Hugging Face directory, or the output of quantize; none with an endpoint.
        task_files: A folder with task files of your own and their data; none for lm_eval's tasks alone.
    """
    from pathlib import Path

    from slmops.lm_evaluate import config, run
    from slmops.step import path_of, step

    with step("lm_evaluate"):
        sidecar = run.run(
            config.LmEvaluateConfig.pick(locals()),
            model=path_of(model),
            task_files=path_of(task_files),
            lm_evaluation=Path(lm_evaluation.path),
        )
        lm_evaluation.metadata.update(sidecar.metadata())
        metrics.metadata.update(sidecar.write_metrics(Path(metrics.path)))
