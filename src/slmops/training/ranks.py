"""Training in several processes: who this one is, and what they say to each other.

`torchrun` starts the processes and tells each its rank. They hold the same weights, compute the gradients of their own
rows of a step, and sum them (see docs/adr/0010). Without torchrun there is one process, and nothing here does anything.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from slmops import hardware
from slmops.errors import TransientError

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another: the first writes checkpoints and validates while the others wait."""

BUCKET_BYTES = 64 << 20
"""Gradients are summed in pieces of about this size: few calls, and little memory beside the gradients."""

T = TypeVar("T")


def rank() -> int:
    """This process's number, from 0; rank 0 writes what there is to write."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[None]:
    """Be one of `size()` processes inside the block: over NCCL with a GPU each, else over gloo."""
    if size() == 1:
        yield
        return
    device = hardware.pick_device()
    with _explained():
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(rows: Sequence[T]) -> Sequence[T]:
    """The rows of a step that this process computes; none if there are fewer rows than processes.

    A step's rows are sorted by length, so every n-th row balances the tokens too.
    """
    return rows[rank() :: size()]


def seed(setting: int, step: int) -> int:
    """Seed of a step's dropout: other masks in each process, and the same again after a restart."""
    return random.Random(f"{setting}/{step}/{rank()}").getrandbits(63)


def agree(what: object) -> bool:
    """Whether all processes have the same `what` (anything that pickles)."""
    if size() == 1:
        return True
    found: list[object] = [None] * size()
    with _explained():
        dist.all_gather_object(found, what)
    return all(each == what for each in found)


def sum_numbers(values: Sequence[float], device: torch.device) -> list[float]:
    """The sum of each of `values` over all processes, the same in each; not finite if one of them is not."""
    if size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    with _explained():
        dist.all_reduce(total)
    return total.tolist()


def largest(value: int) -> int:
    """The largest `value` of all processes."""
    if size() == 1:
        return value
    found: list[int] = [0] * size()
    with _explained():
        dist.all_gather_object(found, value)
    return max(found)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Put the sum over all processes into each gradient. A process that had no rows counts as zero."""
    if size() == 1:
        return
    for bucket in _buckets(parameters):
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in bucket])
        with _explained():
            dist.all_reduce(flat)
        for parameter, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = gradient.view_as(parameter)


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters of one type, in their order, in pieces of `BUCKET_BYTES`."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.nbytes for p in bucket) + parameter.nbytes > BUCKET_BYTES
        if bucket and (full or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


@contextmanager
def _explained() -> Iterator[None]:
    """A process whose partner is gone has no fault of its own.

    Raises:
        TransientError: another process ended, or was silent for `TIMEOUT`.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise TransientError(
            f"process {rank()} of {size()} lost another one ({str(error).splitlines()[0][:200]}); "
            "look at the log of the one that ended first"
        ) from error
