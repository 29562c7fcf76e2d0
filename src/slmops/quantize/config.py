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
    """`rtn`: round to nearest; `k_quant`: scales and zero points searched for least squared error."""
    symmetric: bool = False
    """Leave out the zero points of `rtn`; some 2 % smaller, and less accurate."""
