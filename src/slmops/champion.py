"""The champion: what the nodes of a channel run now. fetch_champion leaves it, evaluate measures it, the gate asks it.

It is an artifact of variants with at most one in it. Where there is none, its facts say why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from slmops import artifacts
from slmops.artifacts import Sidecar, Summary

STEP = "fetch_champion"

Status = Literal["found", "no_release", "cannot_run"]
"""`no_release`: nothing was published to the channel yet; `cannot_run`: no variant of the release runs where it was
fetched."""


def without_model(artifact: Path) -> Sidecar | None:
    """The sidecar of what fetch_champion left if there is no model in it; None for anything else."""
    if not (artifact / artifacts.SIDECAR).exists():
        return None
    sidecar = artifacts.read(artifact)
    return sidecar if sidecar.step == STEP and sidecar.facts["status"] != "found" else None


def release_facts(sidecar: Sidecar) -> dict[str, Any]:
    """What an evaluation says of the champion that it is of; nothing if `sidecar` is of another model."""
    if sidecar.step != STEP:
        return {}
    return {name: sidecar.facts[name] for name in ("channel", "released_as") if name in sidecar.facts}


def fetched_for(evaluation: Sidecar) -> Summary | None:
    """What fetch_champion left for `evaluation`; None for the evaluation of any other model."""
    found = (a for a in evaluation.ancestors if a.step == STEP and a.digest in evaluation.parents)
    return next(found, None)
