"""Where the step runs: disk, memory, GPUs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from slmops import memory
from slmops.errors import UserError
from slmops.preflight.findings import Findings

GIB = 1024**3


def check_disk(directory: Path, min_gib: float) -> Findings:
    """`directory` can be written and has that much space."""
    found = Findings()
    with found.about("disk"):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                free = shutil.disk_usage(directory).free
        except OSError as error:
            raise UserError(
                f"{directory} cannot be written ({error.strerror}); check the volume and its owner"
            ) from None
        found.facts["free_disk_bytes"] = free
        if free < min_gib * GIB:
            raise UserError(
                f"{directory} has {free / GIB:.1f} GiB free, min_free_disk_gib asks for {min_gib:g}; make room, or "
                "take a larger volume"
            )
    return found


def check_memory(min_gib: float) -> Findings:
    """This process may use that much memory."""
    found = Findings()
    with found.about("memory"):
        free = memory.free_bytes()
        if free is None:
            found.warnings.append("memory: this system does not say how much is free")
            return found
        found.facts["free_memory_bytes"] = free
        if free < min_gib * GIB:
            raise UserError(
                f"{free / GIB:.1f} GiB are free, min_free_memory_gib asks for {min_gib:g}; raise the container's "
                "limit, or end other programs"
            )
    return found


def check_gpus(min_gpus: int, min_gib: float) -> Findings:
    """So many GPUs are visible, each with that much memory."""
    found = Findings()
    if min_gpus == 0:
        return found

    import torch

    with found.about("GPU"):
        count = torch.cuda.device_count()
        devices = [torch.cuda.get_device_properties(index) for index in range(count)]
        found.facts["gpus"] = [f"{device.name}, {device.total_memory / GIB:.1f} GiB" for device in devices]
        if count < min_gpus:
            raise UserError(
                f"min_gpus asks for {min_gpus}, found {count}; place this step on a GPU node with that many, and check "
                f"that the image's torch ({torch.__version__}) is built for its driver"
            )
        small = [
            name
            for device, name in zip(devices, found.facts["gpus"], strict=True)
            if device.total_memory < min_gib * GIB
        ]
        if small:
            raise UserError(f"min_gpu_memory_gib asks for {min_gib:g}, found {small[0]}; choose a larger GPU, or QLoRA")
    return found
