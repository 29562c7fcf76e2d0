"""Settings of quantize."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slmops.config import Config

VariantName = Literal["cpu-int4", "cpu-int8"]


class QuantizeConfig(Config):
    """One ONNX Runtime GenAI directory per variant."""

    variants: list[VariantName] = Field(default=["cpu-int4"], min_length=1)
    """Variants to build."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share one scale."""
    algorithm: Literal["rtn", "k_quant"] = "rtn"
    """`rtn`: round to nearest, smallest; `k_quant`: scales searched for least squared error, larger."""
