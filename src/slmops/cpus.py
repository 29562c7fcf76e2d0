"""How many cores this process may keep busy: the machine's, or fewer where affinity or a container has a limit."""

from __future__ import annotations

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of a period that the container may run, or the word `max`; and the period's (cgroup v2)."""
QUOTA_V1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def count() -> int:
    """OMP_NUM_THREADS where that is set, else the cores that affinity and the container's quota allow."""
    if (wanted := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(wanted) > 0:
        return int(wanted)
    return min(len(os.sched_getaffinity(0)), _quota())


def _quota() -> int:
    try:
        quota, period = QUOTA.read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (path.read_text() for path in QUOTA_V1)
        except OSError:
            return 1 << 30
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # the word `max`
        return 1 << 30
    return max(1, math.ceil(share)) if share > 0 else 1 << 30
