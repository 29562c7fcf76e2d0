"""What the channel's nodes run now, as far as it could be evaluated, and whether variants are held against it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.artifacts import Sidecar
from slmops.champion import fetched_for
from slmops.gate.candidates import Measured, find
from slmops.gate.config import GateConfig
from slmops.gate.judge import CHAMPION_REGRESSION
from slmops.gate.subjects import Subject
from slmops.verdicts import Check


@dataclass(frozen=True)
class Champion:
    """The champion, in one of four states: none was asked for, there is none yet, it could not be evaluated, it was."""

    sidecar: Sidecar | None = None
    """Of its evaluation, whatever came of that."""
    opponent: Measured | None = None
    """What each variant is held against; None for nothing."""
    passed_over: str | None = None
    """Why it was not evaluated, where that keeps nothing from passing."""
    said: str | None = None
    """Who it is, or why there is none, for people."""

    @property
    def subject(self) -> Subject | None:
        """Its figures, if there are any."""
        measured = self.opponent and self.opponent.sidecar.facts.get("status", "measured") == "measured"
        return Subject("champion", self.sidecar, None) if measured else None

    def unasked(self, config: GateConfig) -> tuple[Check, ...]:
        """The check that could not run and does not count."""
        if self.passed_over is None:
            return ()
        detail = f"{self.passed_over}; it does not count, because champion_required is false"
        threshold = -config.max_regression
        return (Check(name=CHAMPION_REGRESSION, value=None, threshold=threshold, verdict="not_run", detail=detail),)


def find_champion(path: Path | None, config: GateConfig) -> Champion:
    """The champion by its evaluation at `path`, if there is one.

    Raises:
        ArtifactError: it exists, but is half-written, damaged or of another kind.
    """
    found = find(path, "evaluation")
    if found is None:
        return Champion()
    facts, fetched = found.sidecar.facts, fetched_for(found.sidecar)
    reason = str(facts.get("reason"))
    if fetched and fetched.facts.get("status") == "no_release":
        return Champion(found.sidecar, said=reason)
    name = _name(facts, fetched.facts if fetched else {})
    if facts.get("status") not in ("not_run", "failed"):
        return Champion(found.sidecar, found, said=name)
    said = f"{name}, was not evaluated: {reason}"
    if config.champion_required:
        return Champion(found.sidecar, found, said=said)
    return Champion(found.sidecar, passed_over=reason, said=said)


def _name(evaluated: dict[str, Any], fetched: dict[str, Any]) -> str:
    """Variant, release and channel, as far as they are known."""
    release = fetched.get("release")
    if not isinstance(release, dict):
        return str(evaluated.get("variant") or "a model")
    of_variant = f"{evaluated['released_as']} of " if "released_as" in evaluated else ""
    return f"{of_variant}release {release['digest']:.12}, number {release['sequence']} of channel {fetched['channel']}"
