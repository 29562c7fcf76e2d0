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
    second_teacher: Input[Model] = None,
    third_teacher: Input[Model] = None,
    num_epochs: float = 1.0,
    learning_rate: float = 0.0002,
    warmup_fraction: float = 0.05,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    batch_size: int = 16,
    micro_batch_size: int = 16,
    max_length: int = 512,
    packing: bool = False,
    activation_checkpointing: bool = False,
    sharding: str = "none",
    torch_compile: bool = False,
    num_validations: int = 3,
    max_validation_rows: int = 48,
    patience: int = 1000,
    keep_weights: str = "last",
    num_metric_rows: int = 0,
    max_metric_tokens: int = 64,
    task_settings: dict = {},  # noqa: B006
    checkpoint_interval_s: float = 30.0,
    checkpoint_uri: str = "work_dir",
    dtype: str = "auto",
    seed: int = 0,
    num_nodes: int = 1,
    training_runtime: str = "slmops-torch",
    queue_name: str = "slmops-gpu",
    pending_timeout_s: float = 86400.0,
    objective: str = "logits",
    teacher_logits: str = "cached",
    divergence: str = "forward_kl",
    divergence_settings: dict = {},  # noqa: B006
    temperature: float = 1.0,
    hard_label_weight: float = 0.0,
    teacher_weights: list[float] = [],  # noqa: B006
    hidden_weight: float = 0.0,
    attention_weight: float = 0.0,
    layer_map: list[int] = [],  # noqa: B006
    on_policy_start: float = 0.0,
    on_policy_end: float = 0.0,
    answer_temperature: float = 1.0,
    max_answer_tokens: int = 128,
    student_weights: str = "kept",
    student_shape: dict = {},  # noqa: B006
    layer_rule: str = "spread",
    keep_layers: list[int] = [],  # noqa: B006
) -> None:
    """Train a student on a teacher's responses.

    Args:
        responses: The teacher's answers from generate_responses; chat records, too, where objective is responses.
        validation: Chat records to measure the loss on.
        teacher: The model that gave the responses.
        student: The model to start from, a Hugging Face directory.
        second_teacher: Another teacher, for teacher_logits=online.
        third_teacher: A third one.
        model: The trained student.
        metrics: Steps, tokens and speed of the training.
        task_config: Filled in by KFP for `distill_on_nodes`, the same component for several nodes; never given.
    """
    from pathlib import Path

    from slmops.distill.config import DistillConfig
    from slmops.kubeflow import nodes
    from slmops.step import path_of, step

    with step("distill"):
        sidecar = nodes.train(
            "distill",
            DistillConfig.pick(locals()),
            task_config=task_config,
            responses=Path(responses.path),
            validation=Path(validation.path),
            teacher=Path(teacher.path),
            student=Path(student.path),
            second_teacher=path_of(second_teacher),
            third_teacher=path_of(third_teacher),
            model=Path(model.path),
        )
        model.metadata.update(sidecar.metadata())
        metrics.metadata.update(sidecar.write_metrics(Path(metrics.path)))


distill_on_nodes = dsl.component(
    distill.python_func, base_image=images.TRAIN, install_kfp_package=False, task_config_passthroughs=FORWARDED
)
