"""The variants that can be asked for, by name, and those that cannot, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slmops.device_classes import NOT_BUILDABLE, DeviceClass

GENAI = "onnxruntime-genai"
EXECUTORCH = "executorch"

Algorithm = Literal["rtn", "k_quant", "gptq", "awq", "mixed", "int8", "fp16"]


@dataclass(frozen=True)
class Variant:
    """One way to build a model for one kind of device."""

    name: str
    """It begins with the execution provider."""
    precision: str
    """What most weights are stored in: int4, int8 or fp16."""
    algorithm: Algorithm
    """How weights are rounded; `int8`, `fp16`: to the nearest, which is near enough."""
    execution_provider: Literal["cpu", "cuda"] = "cpu"
    backend: str = GENAI
    """What builds and runs it."""
    architectures: tuple[str, ...] = ("aarch64", "x86_64")
    """The processors that it runs on."""
    calibrated: bool = False
    """Whether it needs rows of the task to be built."""

    @property
    def in_blocks(self) -> bool:
        """Whether weights share a scale by blocks; ExecuTorch's 8-bit weights share one by rows."""
        return self.precision != "fp16" and (self.backend, self.precision) != (EXECUTORCH, "int8")

    def fits(self, device: DeviceClass) -> bool:
        """Whether devices of a class can run it."""
        return device.execution_provider == self.execution_provider and device.architecture in self.architectures


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("cpu-int4", "int4", "rtn"),
        Variant("cpu-int4-kquant", "int4", "k_quant"),
        Variant("cpu-int4-gptq", "int4", "gptq", calibrated=True),
        Variant("cpu-int4-awq", "int4", "awq", calibrated=True),
        Variant("cpu-int4-mixed", "int4", "mixed", calibrated=True),
        Variant("cpu-int8", "int8", "int8"),
        Variant("cpu-int4-executorch", "int4", "rtn", backend=EXECUTORCH),
        Variant("cpu-int8-executorch", "int8", "int8", backend=EXECUTORCH),
        Variant("cuda-int4", "int4", "rtn", execution_provider="cuda"),
        Variant("cuda-fp16", "fp16", "fp16", execution_provider="cuda"),
    )
}
"""Every variant that can be built."""

REFUSED: Mapping[str, str] = {
    "cpu-fp16": "onnxruntime-genai 0.18 builds and loads it, and ONNX Runtime fails at its second token on a CPU "
    "(shape mismatch in a cast of the key-value cache); use cpu-int8",
    "cpu-int4-hqq": "Olive's pass OnnxHqq renames the output to logits_Q4, which no runtime finds; use cpu-int4-kquant",
    "cpu-int4-blockwise": "Olive's pass OnnxBlockWiseRtn renames the output to logits_Q4, which no runtime finds; use "
    "cpu-int4",
    "cpu-int4-autoawq": "Olive's pass AutoAWQQuantizer needs the package autoawq, which is no longer kept and needs "
    "triton and a GPU; use cpu-int4-awq, which does the same",
    "cpu-int4-asymmetric": "with is_symmetric=false and a tied embedding onnxruntime-genai writes a file that ONNX "
    "Runtime does not load; use cpu-int4-gptq, which has zero points",
    "cpu-int4-modelbuilder": "Olive's pass ModelBuilder does not work with onnxruntime-genai since 0.15; use cpu-int4",
}
"""What is known not to work, and why."""


def unusable(name: str) -> str | None:
    """Why no variant of this name can be built; None if it can."""
    if name in VARIANTS:
        return None
    if name in REFUSED:
        return f"{name} cannot be built: {REFUSED[name]}"
    return f"{name!r:.80} is no variant; there are {', '.join(sorted(VARIANTS))}"


def by_class(names: Iterable[str], classes: Mapping[str, DeviceClass]) -> dict[str, Any]:
    """For each device class, the variants among `names` that it can run, and why none can be built if so."""
    names = list(names)
    matrix: dict[str, Any] = {}
    for label, device in classes.items():
        matrix[label] = {"variants": [name for name in names if VARIANTS[name].fits(device)]}
        if device.execution_provider in NOT_BUILDABLE:
            matrix[label]["not_buildable"] = NOT_BUILDABLE[device.execution_provider]
    return matrix
