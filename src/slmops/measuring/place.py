"""Whether this machine can stand for a device of a class, and what sets the two apart."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from slmops.device_classes import CPUINFO_NAMES, NOT_BUILDABLE, DeviceClass, cpu_features, this_architecture

KERNEL_FEATURES = {
    "x86_64": (
        "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "avx_vnni_int8", "amx_tile", "amx_int8",
        "amx_bf16",
    ),
    "aarch64": ("asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme", "sme2"),
}  # fmt: skip
"""Features of a processor for which runtimes have kernels of their own, as /proc/cpuinfo names them.

ONNX Runtime chooses by CPUID, and no setting of it or of its environment holds it to fewer.
"""


def not_this_device(device_class: DeviceClass) -> str | None:
    """Why nothing that is measured here is true of the class; None if it is."""
    here, provider = this_architecture(), device_class.execution_provider
    if device_class.architecture != here:
        return f"this machine is {here}, the device {device_class.architecture}"
    if provider in NOT_BUILDABLE:
        return NOT_BUILDABLE[provider]
    if missing := device_class.missing_features(cpu_features()):
        return f"this machine's processor lacks {', '.join(missing)}"
    if provider == "cuda" and not has_gpu():
        return "this machine has no NVIDIA GPU, the device has one"
    return None


def differences(device_class: DeviceClass) -> dict[str, Any]:
    """Facts about a machine that is not quite the device.

    `num_cpus_missing`: it has that many CPUs fewer. It is measured all the same, with as many threads as it has: a
    variant that is fast enough on fewer cores is fast enough.
    `more_than_class`: features that the class does not promise and that runtimes use. They flatter the class: the same
    variant may be slower on its devices.
    """
    missing = device_class.num_cpus - len(os.sched_getaffinity(0))
    declared = {CPUINFO_NAMES.get(name.lower(), name.lower()) for name in device_class.instruction_sets}
    if any(name.startswith("avx512") for name in declared):
        declared.add("avx512f")  # what all others of AVX-512 build upon
    relevant = KERNEL_FEATURES[device_class.architecture]
    more = [name for name in relevant if name in cpu_features() and name not in declared]
    return ({"num_cpus_missing": missing} if missing > 0 else {}) | ({"more_than_class": more} if more else {})


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether this process sees an NVIDIA GPU, by its device file or, in WSL, the one of all GPUs."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()


def cpu_name() -> str:
    """Model of the processor, as the kernel tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
