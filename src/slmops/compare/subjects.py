"""The models that are compared, each with its evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slmops import artifacts
from slmops.artifacts import Sidecar, Summary
from slmops.errors import ArtifactError, DataError

Role = Literal["teacher", "untrained", "labels_only", "distilled"]

NAMES: dict[Role, str] = {
    "teacher": "teacher",
    "untrained": "untrained student",
    "labels_only": "labels-only student",
    "distilled": "distilled student",
}
"""In the order in which they are shown."""


@dataclass(frozen=True)
class Subject:
    """One model, and what was measured of it."""

    role: Role
    directory: Path
    """Of the evaluation."""
    evaluation: Sidecar

    @property
    def name(self) -> str:
        return NAMES[self.role]

    @property
    def model(self) -> Summary | None:
        """The model before it was quantized, if it was; None if the lineage does not say."""
        by_digest = {summary.digest: summary for summary in self.evaluation.ancestors}
        parents = [by_digest[digest] for digest in self.evaluation.parents if digest in by_digest]
        sources = [
            by_digest.get(digest) for parent in parents if parent.kind == "variants" for digest in parent.parents
        ]
        return next((found for found in (*parents, *sources) if found and found.kind == "hf_model"), None)

    @property
    def num_parameters(self) -> float | None:
        found = self.model.facts.get("num_parameters") if self.model else None
        return float(found) if isinstance(found, int) else None

    def number(self, name: str) -> float | None:
        """A measured number, or None if there is none: absent, of another type, NaN or infinite."""
        value = self.evaluation.facts.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value)


def open_subjects(
    teacher: Path, untrained: Path | None, labels_only: Path | None, distilled: Path
) -> dict[Role, Subject]:
    """The subjects that were evaluated, in the order in which they are shown.

    Raises:
        ArtifactError: an evaluation is missing or half-written.
        DataError: answers were not judged in the same way.
    """
    given: dict[Role, Path | None] = {
        "teacher": teacher,
        "untrained": untrained,
        "labels_only": labels_only,
        "distilled": distilled,
    }
    subjects = {
        role: Subject(role, path, artifacts.expect(path, "evaluation"))
        for role, path in given.items()
        if path is not None
    }
    _check_judged_alike(list(subjects.values()))
    return subjects


def check_model(model: Sidecar, distilled: Subject) -> None:
    """
    Raises:
        ArtifactError: `model` is not the one that was evaluated.
    """
    evaluated = distilled.model
    if evaluated is None or evaluated.digest != model.digest:
        of = f", not {evaluated.digest[:12]}" if evaluated else ""
        raise ArtifactError(
            f"model has the digest {model.digest[:12]}{of}, so it is not the distilled student that was evaluated; "
            "give the model that was evaluated, or none"
        )


def _check_judged_alike(subjects: Sequence[Subject]) -> None:
    teacher = subjects[0]
    for subject in subjects[1:]:
        for name, found in _rules(subject).items():
            wanted = _rules(teacher)[name]
            if found != wanted:
                raise DataError(
                    f"{subject.role} and teacher cannot be compared: {name} was {found} for {subject.role} and "
                    f"{wanted} for teacher; evaluate both with the same settings"
                )


def _rules(subject: Subject) -> dict[str, object]:
    """What decides whether an answer is right."""
    match = subject.evaluation.facts.get("match")
    settings = subject.evaluation.config.get("task_settings") if match == "task" else None
    return {"match": match, "task_settings": settings}
