"""How much memory this process may use: the machine's, or less where a container has a limit."""

from __future__ import annotations

import os
import re
from pathlib import Path

LIMIT = Path("/sys/fs/cgroup/memory.max")
UNLIMITED = 1 << 62
KEY_VALUE_FRACTION = 0.4
"""Share of the free memory that keys and values of answers at work may take."""
ASSUMED_FREE_BYTES = 1 << 32
"""Where the system does not say."""


def limit_bytes() -> int:
    """The memory limit of the container that this process is in (cgroup v2), or a number above any machine's."""
    try:
        return int(LIMIT.read_text())
    except (OSError, ValueError):  # no cgroup v2, or the word `max`
        return UNLIMITED


def free_bytes() -> int | None:
    """What can still be used without swapping; None where the system does not say."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    free = int(available[1]) * 1024 if available else free
    return min(free, limit_bytes())


def key_value_bytes() -> int:
    """What keys and values may take of what is free now."""
    return int((free_bytes() or ASSUMED_FREE_BYTES) * KEY_VALUE_FRACTION)
