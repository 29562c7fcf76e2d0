"""Settings of distill."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from slmops.training.config import TrainingConfig


class DistillConfig(TrainingConfig):
    """A student learns from a teacher's responses, or from its distribution over tokens."""

    objective: Literal["responses", "logits"] = "logits"
    """`responses`: cross-entropy on the responses' text; `logits`: a divergence from the teacher's distribution."""
    teacher_logits: Literal["cached", "online"] = "cached"
    """`cached`: the top-k kept by generate_responses; `online`: the teacher runs beside the student."""
    divergence: str = Field(default="forward_kl", min_length=1)
    """`forward_kl`, `reverse_kl`, `jensen_shannon`, or an entry point of the group slmops.divergences."""
    divergence_settings: dict[str, Any] = Field(default={})
    """Settings of the divergence by name, such as `{"beta": 0.1}` of jensen_shannon."""
    temperature: float = Field(default=1.0, gt=0, le=20)
    """Softens both distributions; the loss is scaled by its square (Hinton et al. 2015, arXiv:1503.02531)."""
    hard_label_weight: float = Field(default=0.0, ge=0, lt=1)
    """Share of cross-entropy on the responses in the loss of `logits`, 0 to 1."""
    teacher_weights: list[float] = Field(default=[])
    """Weights of several teachers, in their order; empty weighs them alike."""
    hidden_weight: float = Field(default=0.0, ge=0, le=1000)
    """Weight of the distance between hidden states of student and first teacher; 0 leaves it out."""
    attention_weight: float = Field(default=0.0, ge=0, le=1000)
    """Weight of the distance between where their heads look; 0 leaves it out."""
    layer_map: list[int] = Field(default=[])
    """The teacher's layer, from 0, that each of the student's is matched with; empty spreads them evenly."""
    on_policy_start: float = Field(default=0.0, ge=0, le=1)
    """Share of steps on the student's own answers at the beginning of the run, 0 to 1."""
    on_policy_end: float = Field(default=0.0, ge=0, le=1)
    """The same at its end; in between it changes evenly."""
    answer_temperature: float = Field(default=1.0, gt=0, le=20)
    """Temperature at which the student's own answers are drawn."""
    max_answer_tokens: int = Field(default=128, ge=1, le=32768)
    """Longest own answer in tokens."""
    student_weights: Literal["kept", "fresh"] = "kept"
    """`kept`: the student's checkpoint, or parts of it; `fresh`: its architecture with random weights."""
    student_shape: dict[str, int] = Field(default={})
    """Sizes other than the checkpoint's: num_hidden_layers, hidden_size, intermediate_size, num_attention_heads, ..."""
    layer_rule: Literal["spread", "first", "last", "importance"] = "spread"
    """Which layers stay if num_hidden_layers is smaller; `importance` is measured on the training rows."""
    keep_layers: list[int] = Field(default=[])
    """Layers of the checkpoint to keep by hand, counted from 0, in rising order; empty leaves it to the rule."""

    @model_validator(mode="after")
    def _has_a_teacher_where_one_is_needed(self) -> Self:
        online = self.objective == "logits" and self.teacher_logits == "online"
        for name in ("on_policy_start", "on_policy_end", "hidden_weight", "attention_weight"):
            if getattr(self, name) and not online:
                raise ValueError(
                    f"{name} of {getattr(self, name):g} needs a teacher that runs beside the student; set "
                    "objective=logits and teacher_logits=online"
                )
        if self.sharding == "full" and max(self.on_policy_start, self.on_policy_end) > 0:
            raise ValueError("own answers need the whole student for generating; set sharding=none")
        if self.teacher_weights and (min(self.teacher_weights) < 0 or sum(self.teacher_weights) <= 0):
            raise ValueError(f"teacher_weights must be 0 or more and not all 0, got {self.teacher_weights}")
        return self
