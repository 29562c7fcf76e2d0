"""Settings of distill."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slmops.training.config import TrainingConfig


class DistillConfig(TrainingConfig):
    """A student learns from a teacher's responses, or from its distribution over tokens."""

    objective: Literal["responses", "logits"] = "logits"
    """`responses`: cross-entropy on the teacher's text; `logits`: forward KL to the teacher's distribution."""
    teacher_logits: Literal["cached", "online"] = "cached"
    """`cached`: the top-k kept by generate_responses; `online`: the teacher runs beside the student."""
    temperature: float = Field(default=1.0, gt=0, le=20)
    """Softens both distributions; the loss is scaled by its square (Hinton et al. 2015, arXiv:1503.02531)."""
    hard_label_weight: float = Field(default=0.0, ge=0, lt=1)
    """Share of cross-entropy on the responses in the loss of `logits`, 0 to 1."""
    keep_layers: list[int] = Field(default=[])
    """Layers of the student's checkpoint to keep, counted from 0, in rising order; empty keeps all."""
