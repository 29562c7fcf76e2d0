"""What torch computes on: device and dtype by what the hardware has."""

from __future__ import annotations

import ctypes
import gc
import os
import resource

import torch

from slmops import cpus
from slmops.errors import ConfigError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt(3)."""


def pick_device() -> torch.device:
    """The GPU of this process, else the CPU.

    Of several processes on a machine, which torchrun numbers in LOCAL_RANK, each has one of its own.

    Raises:
        ConfigError: there are more processes than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"process {number} of this machine finds {count} GPUs; start as many processes as there are "
            f"(torchrun --nproc-per-node={count})"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def pick_dtype(setting: str, device: torch.device) -> torch.dtype:
    """The compute type for `auto`, `float32` or `bfloat16`.

    `auto` takes bfloat16 only where the hardware multiplies it (a CPU with AMX or AVX512-BF16, an Ampere GPU): there
    its products are up to five times as fast, elsewhere its emulation is many times slower than float32. float16 is
    never chosen, because training in it needs loss scaling.
    """
    if setting != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has = torch.cpu.get_capabilities()
        native = bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


def describe(device: torch.device, dtype: torch.dtype) -> str:
    return f"{device.type}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"


def use_all_cores() -> None:
    """One thread for each core that this process may use, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cpus.count())


def use_huge_pages() -> None:
    """Give tensors of 2 MB and more pages of 2 MB, where the kernel has them; for a step that trains.

    A training step allocates and frees the same large tensors each time, and the kernel hands each out again in zeroed
    pages: with large ones a step of the demo's distillation is a sixth shorter. torch reads the variable once, at its
    first tensor, so a process that has made one is left as it is.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors leave, instead of giving it back to the kernel each time.

    A forward pass on a CPU makes the same large tensors in every layer. By default glibc returns each to the kernel,
    which hands it out again in zeroed pages of 4 kB: a third of the time of generating answers. What is kept is the
    most that was in use at once. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, size_bytes in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 1 << 26)):
        mallopt(parameter, size_bytes)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether less at once may help."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory(device: torch.device) -> None:
    """Give back what torch keeps for later, once nothing refers to it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_bytes(device: torch.device) -> int:
    """The most that tensors took on a GPU; on a CPU, the most that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
