"""Settings of generate_responses."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from slmops.config import Config


class GenerateResponsesConfig(Config):
    """A teacher answers the prompts of a dataset."""

    teacher_kind: Literal["model", "endpoint"] = "model"
    """`model`: a model directory, run by this step; `endpoint`: any server with the OpenAI chat API."""
    endpoint_url: str = Field(default="http://localhost:8000/v1", pattern=r"^https?://[^\s]+$")
    """Base address of the endpoint, such as https://host/v1."""
    endpoint_model: str = Field(default="default", min_length=1)
    """The teacher's name at the endpoint."""
    max_rows: int = Field(default=1_000_000, ge=1)
    """Answer at most this many prompts: the first ones, in the dataset's (shuffled) order."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """Longest answer in tokens; an answer that is cut off there is left out and counted."""
    decoding: Literal["greedy", "sample"] = "greedy"
    """`greedy`: the likeliest token; `sample`: drawn with temperature and top_p."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Temperature of sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this much of the probability."""
    batch_size: int = Field(default=32, ge=1, le=4096)
    """Prompts answered together; with an endpoint, requests on their way at once."""
    logits_top_k: int = Field(default=0, ge=0, le=1024)
    """Log-probabilities kept per answer token; 0 keeps none."""
    logits_temperature: float = Field(default=1.0, gt=0, le=20)
    """Temperature at which they are kept; distillation from them runs at the same one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 where the hardware multiplies it natively, else float32."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling."""

    @model_validator(mode="after")
    def _greedy_ignores_nothing(self) -> Self:
        if self.decoding == "greedy" and (self.temperature != 1.0 or self.top_p != 1.0):
            raise ValueError("temperature and top_p need decoding=sample")
        return self

    @model_validator(mode="after")
    def _endpoint_gives_text(self) -> Self:
        if self.teacher_kind == "endpoint" and self.logits_top_k:
            raise ValueError(f"logits_top_k needs teacher_kind=model: an endpoint gives text, got {self.logits_top_k}")
        return self
