"""KFP interface of finetune."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output
from slmops_components.documented import documented
from slmops_components.training.forwarded import FORWARDED

from slmops.finetune.config import FinetuneConfig


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
@documented(FinetuneConfig)
def finetune(
    train: Input[Dataset],
    validation: Input[Dataset],
    base: Input[Model],
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
    method: str = "lora",
    lora_rank: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
) -> None:
    """Fine-tune a model on chat records.

    Args:
        train: Chat records to train on.
        validation: Chat records to measure the loss on.
        base: The model to start from, a Hugging Face directory.
        model: The fine-tuned model, adapters merged.
        metrics: Steps, tokens and speed of the training.
        task_config: Filled in by KFP for `finetune_on_nodes`, the same component for several nodes; never given.
    """
    from pathlib import Path

    from slmops.finetune.config import FinetuneConfig
    from slmops.kubeflow import nodes
    from slmops.step import step

    with step("finetune"):
        sidecar = nodes.train(
            "finetune",
            FinetuneConfig.pick(locals()),
            task_config=task_config,
            train=Path(train.path),
            validation=Path(validation.path),
            base=Path(base.path),
            model=Path(model.path),
        )
        model.metadata.update(sidecar.metadata())
        metrics.metadata.update(sidecar.write_metrics(Path(metrics.path)))


finetune_on_nodes = dsl.component(
    finetune.python_func, base_image=images.TRAIN, install_kfp_package=False, task_config_passthroughs=FORWARDED
)
