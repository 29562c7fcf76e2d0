"""Settings of finetune."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from slmops.training.config import TrainingConfig


class FinetuneConfig(TrainingConfig):
    """Supervised fine-tuning on the assistant's tokens."""

    method: Literal["full", "lora", "qlora"] = "lora"
    """`full`: all weights; `lora`: low-rank adapters, merged at the end; `qlora`: the same over a 4-bit base."""
    lora_rank: int = Field(default=16, ge=1, le=1024)
    """Rank of the adapters."""
    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the adapters; they count alpha / rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapters, 0 to 1."""

    @model_validator(mode="after")
    def _shards_whole_weights(self) -> Self:
        if self.sharding == "full" and self.method != "full":
            raise ValueError(f"sharding=full is for method=full; adapters are small, got method={self.method}")
        return self
