"""Whether tests can limit memory here, and how to go on as if they could not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from slmops.measuring import limits


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
