"""Settings that finetune and distill share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from slmops.config import Config

KUBERNETES_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"


class TrainingConfig(Config):
    """How the optimizer runs, and where."""

    PLACE: ClassVar[frozenset[str]] = frozenset(
        {"num_nodes", "training_runtime", "queue_name", "pending_timeout_s", "checkpoint_uri", "checkpoint_interval_s"}
    )

    num_epochs: float = Field(default=1.0, ge=0, le=1000)
    """Passes over the training rows; a fraction stops within the last pass, 0 trains nothing."""
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    """Peak learning rate of AdamW."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero; after it, cosine to a tenth of the peak."""
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decoupled weight decay of AdamW, on matrices only."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    batch_size: int = Field(default=16, ge=1, le=65536)
    """Rows per optimizer step."""
    micro_batch_size: int = Field(default=16, ge=1, le=65536)
    """Rows per forward pass; smaller needs less memory and gives the same gradients."""
    max_length: int = Field(default=512, ge=16, le=1_000_000)
    """Longest row in tokens; a longer one is left out and counted."""
    packing: bool = False
    """Put the rows of a forward pass one behind the other, without padding; for rows of very unequal length."""
    activation_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass: a third more time, and far less memory."""
    sharding: Literal["none", "full"] = "none"
    """`none`: every process holds the whole model; `full`: a part of weights, gradients and optimizer each (FSDP2)."""
    torch_compile: bool = False
    """Compile the layers with torch.compile, which takes minutes at first; needs a C++ compiler on a CPU."""
    num_validations: int = Field(default=3, ge=2, le=1000)
    """How often the loss on held-out rows is measured, before the first and after the last step included."""
    max_validation_rows: int = Field(default=48, ge=1)
    """Held-out rows that are used for it: the first ones."""
    patience: int = Field(default=1000, ge=1)
    """Validations in a row without a lower loss, after which training stops early."""
    keep_weights: Literal["last", "best"] = "last"
    """Weights of the last step, or of the validation with the lowest loss."""
    num_metric_rows: int = Field(default=0, ge=0)
    """Held-out rows that are answered at each validation; their task says which are right."""
    max_metric_tokens: int = Field(default=64, ge=1)
    """Longest of these answers in tokens."""
    task_settings: dict[str, Any] = Field(default={})
    """Settings of their tasks by name: `{"classification": {"labels": ["yes", "no"]}}`."""
    checkpoint_interval_s: float = Field(default=30.0, gt=0)
    """Seconds between two checkpoints, from which a killed run goes on."""
    checkpoint_uri: str = Field(default="work_dir", min_length=1)
    """Where checkpoints lie: `work_dir` for the step's work directory, else s3://bucket/prefix or a path."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of the matrix products; `auto`: bfloat16 where the hardware multiplies it natively, else float32."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of rows and of new weights."""
    num_nodes: int = Field(default=1, ge=1, le=1024)
    """Nodes that share the rows of each step; more than 1 needs a cluster with Kubeflow Trainer."""
    training_runtime: str = Field(default="slmops-torch", pattern=KUBERNETES_NAME, max_length=253)
    """Name of the ClusterTrainingRuntime that several nodes train with."""
    queue_name: str = Field(default="slmops-gpu", pattern=KUBERNETES_NAME, max_length=63)
    """Name of the Kueue LocalQueue in which a training on several nodes waits for its place."""
    pending_timeout_s: float = Field(default=86400.0, gt=0)
    """Seconds that a training on several nodes may wait until all of its pods run."""

    @model_validator(mode="after")
    def _answers_with_whole_weights(self) -> Self:
        if self.sharding == "full" and self.num_metric_rows:
            raise ValueError("num_metric_rows needs the whole model for generating; set sharding=none, or leave it 0")
        return self
