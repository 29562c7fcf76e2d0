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
"""Environment variable: a directory that outlives the process (in a cluster a mounted volume)."""


def work_dir(step: str, config: Config, inputs: Sequence[Sidecar], output: Path) -> Path:
    """A directory for unfinished work that only the same step with the same settings and inputs finds again.

    It lies in `$SLMOPS_WORK_DIR`, or beside `output` if that is not set. The step removes it when it is done.
    """
    key = json.dumps([step, config.parameters(), [sidecar.digest for sidecar in inputs]], sort_keys=True)
    root = Path(os.environ.get(WORK_DIR) or output.parent)
    path = root / f"{step}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.work"
    path.mkdir(parents=True, exist_ok=True)
    return path
