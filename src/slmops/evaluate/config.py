"""Settings of evaluate."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from slmops.config import Config


class EvaluateConfig(Config):
    """What a model answers on held-out rows, and how well it predicts the reference answers."""

    variant: str = Field(default="full_precision", pattern=r"^[a-z0-9_-]+$")
    """`full_precision` for a Hugging Face directory, else the name of a quantized variant such as `cpu-int4`."""
    match: Literal["exact", "json", "task"] = "exact"
    """When an answer is right: `exact`: same text but for outer space; `json`: same JSON value; `task`: by its task."""
    task_settings: dict[str, Any] = Field(default={})
    """Settings of tasks by name, for match=task: `{"classification": {"labels": ["yes", "no"]}}`."""
    max_rows: int = Field(default=1_000_000, ge=1)
    """Use at most this many rows: the first ones, in the dataset's (shuffled) order."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """Longest answer in tokens."""
    batch_size: int = Field(default=32, ge=1, le=4096)
    """Prompts answered together, where the runtime batches."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Compute type of a Hugging Face directory; a quantized variant has its own."""
    drift_rows: int = Field(default=64, ge=1, le=1_000_000)
    """Rows on which a model is held against `reference`, token by token, where one is given."""
    layer_drift_rows: int = Field(default=0, ge=0, le=1_000_000)
    """Rows on which drift is also measured up to each layer, at the cost of a pass of `reference` per two layers."""
    num_injections: int = Field(default=16, ge=0, le=10_000)
    """Test rows asked again with an instruction put into the user's turn, which the answer should not follow."""
