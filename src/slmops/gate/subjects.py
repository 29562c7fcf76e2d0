"""Who is judged, and what was measured of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from slmops.artifacts import Sidecar
from slmops.errors import ArtifactError
from slmops.paired import Interval

Source = Literal["evaluation", "benchmark"]

IDENTITY = frozenset({"model_digest", "variant", "device_class", "size_bytes"})
"""Facts that say what was measured, whatever came of it."""
SERVED_RUNTIME = "onnxruntime-genai"
"""What edge servers run; variants for other runtimes are measured beside it, and not published."""


class Missed(Exception):
    """A measurement that ended in a failure which is the model's own: it took more memory than the device has."""


@dataclass(frozen=True)
class Subject:
    """One model and what was measured of it; None for what does not exist."""

    role: Literal["teacher", "student", "candidate", "champion"]
    evaluation: Sidecar | None
    benchmark: Sidecar | None

    def find(self, source: Source) -> Sidecar | None:
        return self.evaluation if source == "evaluation" else self.benchmark

    def sidecar(self, source: Source) -> Sidecar:
        """
        Raises:
            ArtifactError: it was not measured.
        """
        sidecar = self.find(source)
        if sidecar is None:
            raise ArtifactError(f"{self.role}_{source} does not exist")
        return sidecar

    def number(self, source: Source, name: str) -> float | None:
        """A measured number, or None if there is none: absent, of another type, NaN or infinite."""
        sidecar = self.find(source)
        value = sidecar.facts.get(name) if sidecar else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value)

    def text(self, source: Source, name: str) -> str | None:
        """A fact in words, or None."""
        sidecar = self.find(source)
        value = sidecar.facts.get(name) if sidecar else None
        return value if isinstance(value, str) and value else None


@dataclass(frozen=True)
class Paired:
    """A candidate beside others, row by row. A text says why there is no figure."""

    retention: Interval | str
    """Its accuracy over the teacher's."""
    from_student: Interval | str
    """Its accuracy less that of the student in full precision."""
    from_champion: Interval | str | None
    """Its accuracy less that of the model that the pool runs; None where it runs none yet."""
