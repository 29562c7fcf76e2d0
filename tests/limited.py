"""A small device class, whether tests can hold a process to it here, and how to go on as if they could not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from slmops.device_classes import this_architecture
from slmops.measuring import limits

SMALL: dict[str, Any] = {
    "architecture": this_architecture(),
    "instruction_sets": ["SSE2" if this_architecture() == "x86_64" else "ASIMD"],
    "execution_provider": "cpu",
    "num_cpus": 1,
    "ram_mib": 512,
    "disk_mib": 1024,
    "context_length": 100,
    "time_to_first_token_ms_p95": 1000,
    "latency_ms_p95": 1000,
    "tokens_per_s": 1,
    "min_accuracy_kept": 0.5,
}
"""A device class that this machine is, with little memory."""


def _can_make_a_cgroup() -> bool:
    with limits.memory_group(1 << 30) as group:
        return group is not None


needs_cgroup = pytest.mark.skipif(
    not _can_make_a_cgroup(), reason="making a cgroup needs root, or one that is delegated"
)


@contextmanager
def no_cgroup(_: int) -> Iterator[None]:
    """Stands in for `limits.memory_group` on a machine where none can be made."""
    yield None
