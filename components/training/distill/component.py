"""KFP interface of distill."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output
from slmops_components.documented import documented
from slmops_components.training.forwarded import FORWARDED

from slmops.distill.config import DistillConfig


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
@documented(DistillConfig)
def distill(
    responses: Input[Dataset],
    validation: Input[Dataset],
    teacher: Input[Model],
    student: Input[Model],
    model: Output[Model],
    metrics: Output[Metrics],
    task_config: dsl.TaskConfig,
    num_epochs: float = 1.0,
    learning_rate: float = 0.0002,
    warmup_fraction: float = 0.05,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    batch_size: int = 16,
    micro_batch_size: int = 16,
    max_length: int = 512,
    checkpoint_interval_s: float = 30.0,
    dtype: str = "auto",
    seed: int = 0,
    num_nodes: int = 1,
    training_runtime: str = "slmops-torch",
    queue_name: str = "slmops-gpu",
    pending_timeout_s: float = 86400.0,
    objective: str = "logits",
    teacher_logits: str = "cached",
    temperature: float = 1.0,
    hard_label_weight: float = 0.0,
    keep_layers: list[int] = [],  # noqa: B006
) -> None:
    """Train a student on a teacher's responses.

    Args:
        responses: The teacher's answers from generate_responses.
        validation: Chat records to measure the loss on.
        teacher: The model that gave the responses.
        student: The model to start from, a Hugging Face directory.
        model: The trained student.
        metrics: Steps, tokens and speed of the training.
        task_config: Filled in by KFP for `distill_on_nodes`, the same component for several nodes; never given.
    """
    from pathlib import Path

    from slmops.distill.config import DistillConfig
    from slmops.kubeflow import nodes
    from slmops.step import step

    with step("distill"):
        sidecar = nodes.train(
            "distill",
            DistillConfig.pick(locals()),
            task_config=task_config,
            responses=Path(responses.path),
            validation=Path(validation.path),
            teacher=Path(teacher.path),
            student=Path(student.path),
            model=Path(model.path),
        )
        model.metadata.update(sidecar.metadata())
        metrics.metadata.update(sidecar.write_metrics(Path(metrics.path)))


distill_on_nodes = dsl.component(
    distill.python_func, base_image=images.TRAIN, install_kfp_package=False, task_config_passthroughs=FORWARDED
)
