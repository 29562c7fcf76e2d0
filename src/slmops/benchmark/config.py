"""Settings of benchmark."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slmops.config import Config


class BenchmarkConfig(Config):
    """Latency, speed, memory and size of one model on this machine, in a process of its own."""

    variant: str = Field(default="full_precision", pattern=r"^[a-z0-9_-]+$")
    """`full_precision` for a Hugging Face directory, else the name of a quantized variant such as `cpu-int4`."""
    num_requests: int = Field(default=30, ge=1, le=100_000)
    """Measured requests, one after the other."""
    num_warmup: int = Field(default=3, ge=0, le=1000)
    """Requests before them that are not counted."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """Longest answer in tokens."""
    num_threads: int = Field(default=2, ge=1, le=1024)
    """Threads of the runtime."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Compute type of a Hugging Face directory; a quantized variant has its own."""
