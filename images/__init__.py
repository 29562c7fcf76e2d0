"""The images that steps and edge nodes run in, by the names and digests in `digests.yaml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from slmops import __version__

DIGESTS = Path(__file__).with_name("digests.yaml")


def reference(image: str) -> str:
    """`registry/slmops/<image>@sha256:...` once `make images` has recorded a digest, until then the version tag."""
    recorded = _recorded()
    digest = recorded["digests"][image]
    name = "/".join(filter(None, (recorded["registry"], "slmops", image)))
    return f"{name}@{digest}" if digest else f"{name}:{__version__}"


@cache
def _recorded() -> dict[str, Any]:
    recorded: dict[str, Any] = yaml.safe_load(DIGESTS.read_text())
    return recorded


BASE = reference("base")
TRAIN = reference("train")
OPTIMIZE = reference("optimize")
EDGE = reference("edge")
