"""Settings of quantize."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from slmops.config import Config
from slmops.device_classes import DeviceClasses, parse_device_classes
from slmops.quantize.variants import by_class, unusable

BlockSize = Literal[16, 32, 64, 128, 256]


class QuantizeConfig(Config):
    """One directory per variant, ready for the runtime of its devices."""

    variants: list[str] = Field(default=["cpu-int4"], min_length=1)
    """Variants to build, such as `cpu-int4-gptq`; the guide on quantizing lists them."""
    device_classes: DeviceClasses = Field(default={})
    """Device classes by name, as manifests/edge/device-classes.yaml has them; each variant has to fit at least one."""
    block_size: BlockSize = 32
    """Weights that share one scale: fewer are more exact, and larger on disk. ExecuTorch takes multiples of 32."""
    block_sizes: list[BlockSize] = Field(default=[])
    """Block sizes to choose from instead: the largest within `drift_budget`, by calibration; empty: `block_size`."""
    head_bits: Literal[4, 8] = 4
    """Bits of the head and the embedding that is tied to it, in ONNX variants of 4 bits."""
    accept_adapters: bool = False
    """Whether ONNX variants for `cpu` take LoRA adapters that the runtime switches at request time."""
    context_length: int = Field(default=1024, ge=16, le=1 << 20)
    """Tokens of a prompt and its answer in variants for ExecuTorch, whose cache takes that much from the start."""
    model_name: str = Field(default="slmops", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")
    """Name of the model where variants are listed, such as in Foundry Local's cache; the variant's name follows it."""
    drift_budget: float = Field(default=0.01, gt=0, le=10)
    """Largest mean KL divergence from the model in full precision, in nats per token of the answers."""
    calibration_rows: int = Field(default=128, ge=5, le=100_000)
    """Rows of `calibration` to use: the first ones; every fifth of them only measures drift."""
    calibration_max_length: int = Field(default=512, ge=16, le=32_768)
    """Longest calibration row in tokens; longer ones are left out."""

    @field_validator("variants")
    @classmethod
    def _can_be_built(cls, names: list[str]) -> list[str]:
        if problems := [problem for name in names if (problem := unusable(name))]:
            raise ValueError("; ".join(problems))
        if len(set(names)) < len(names):
            raise ValueError(f"each variant once, got {', '.join(names)}")
        return names

    @model_validator(mode="after")
    def _each_has_a_class(self) -> Self:
        if not self.device_classes:
            return self
        matrix = by_class(self.variants, parse_device_classes(self.device_classes, "device_classes"))
        used = {name for found in matrix.values() for name in found["variants"]}
        if idle := [name for name in self.variants if name not in used]:
            raise ValueError(
                f"variants: no device class can run {', '.join(idle)}; the classes are {', '.join(matrix)}; leave "
                "them out, or declare a class with their execution provider and architecture"
            )
        return self
