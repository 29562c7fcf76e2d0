"""Where a step keeps what it needs to go on after a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from slmops.artifacts import Sidecar
from slmops.config import Config

WORK_DIR = "SLMOPS_WORK_DIR"
"""Environment variable: a directory that outlives the process."""
MOUNTED_WORK_DIR = Path("/var/lib/slmops/work")
"""Where a cluster mounts a volume that outlives the pod."""


def work_dir(step: str, config: Config, inputs: Sequence[Sidecar], output: Path) -> Path:
    """A directory for unfinished work that only the same step with the same settings and inputs finds again.

    It lies in `work_root(output)`. The step removes it when it is done.
    """
    path = work_root(output) / f"{step}-{work_key(step, config, inputs)}.work"
    path.mkdir(parents=True, exist_ok=True)
    return path


def work_key(step: str, config: Config, inputs: Sequence[Sidecar]) -> str:
    """16 hex digits that are the same for what computes the same: step, inputs, and settings but those of the place."""
    key = json.dumps([step, config.parameters(*config.PLACE), [sidecar.digest for sidecar in inputs]], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def work_root(output: Path) -> Path:
    """`$SLMOPS_WORK_DIR`, else the volume of a cluster where one is mounted, else the directory of `output`."""
    if named := os.environ.get(WORK_DIR):
        return Path(named)
    return MOUNTED_WORK_DIR if os.access(MOUNTED_WORK_DIR, os.W_OK) else output.parent
