"""The rows that all subjects answered: who was right, and some to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

from slmops.compare.subjects import Role, Subject
from slmops.errors import DataError
from slmops.pages.examples import Example, answer, example
from slmops.records import read_jsonl

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREDICTIONS = "predictions.jsonl"
MIN_ROWS = 2

Outcome = Literal["both", "only_teacher", "only_distilled", "neither"]
"""Who of teacher and distilled student was right."""

OUTCOMES: dict[Outcome, str] = {
    "only_teacher": "only the teacher is right",
    "only_distilled": "only the distilled student is right",
    "neither": "neither is right",
    "both": "both are right",
}
"""In the order in which they are shown."""


@dataclass(frozen=True)
class Rows:
    """The test, R rows."""

    correct: dict[Role, NDArray[Any]]
    """[R] of bool per subject: whether its answer is right."""
    strata: list[str]
    """[R] the group of each row."""
    examples: dict[Outcome, list[Example]]
    """The first rows of each outcome, in the order of the test."""

    def __len__(self) -> int:
        return len(self.strata)


@dataclass
class _Collected:
    correct: dict[Role, list[bool]]
    strata: list[str] = field(default_factory=list)
    examples: dict[Outcome, list[Example]] = field(default_factory=lambda: {outcome: [] for outcome in OUTCOMES})


def read_rows(subjects: Mapping[Role, Subject], max_examples: int) -> Rows:
    """Read the kept predictions of all subjects side by side, a row at a time.

    Raises:
        DataError: they are not of the same rows in the same order, or of fewer than MIN_ROWS, or damaged.
    """
    import numpy as np

    collected = _Collected({role: [] for role in subjects})
    for number, predictions in enumerate(_side_by_side(list(subjects.values())), start=1):
        _check_same_row(number, predictions)
        for role, row in predictions.items():
            collected.correct[role].append(bool(row["correct"]))
        collected.strata.append(str(predictions["teacher"].get("stratum", "")))
        examples = collected.examples[_outcome(predictions)]
        if len(examples) < max_examples:
            answers = {subjects[role].name.capitalize(): answer(row) for role, row in predictions.items()}
            examples.append(example(predictions["teacher"], answers))
    if len(collected.strata) < MIN_ROWS:
        raise DataError(
            f"{len(collected.strata)} row was evaluated, which says nothing of chance; evaluate some hundreds"
        )
    correct = {role: np.array(found) for role, found in collected.correct.items()}
    return Rows(correct, collected.strata, collected.examples)


def _side_by_side(subjects: Sequence[Subject]) -> Iterator[dict[Role, dict[str, Any]]]:
    """The row of each subject by its role; an empty one for a subject that has no more."""
    files = [(row for _, row in read_jsonl(subject.directory / PREDICTIONS)) for subject in subjects]
    for rows in zip_longest(*files, fillvalue={}):
        yield {subject.role: row for subject, row in zip(subjects, rows, strict=True)}


def _check_same_row(number: int, predictions: Mapping[Role, Mapping[str, Any]]) -> None:
    wanted = predictions["teacher"].get("id")
    for role, row in predictions.items():
        if row.get("id") != wanted or "correct" not in row:
            raise DataError(
                f"{role} and teacher were not evaluated on the same rows: row {number:,} is {_shown(row)} for {role} "
                f"and {_shown(predictions['teacher'])} for teacher; evaluate both on the same test rows, with the same "
                "max_rows"
            )


def _shown(row: Mapping[str, Any]) -> str:
    return f"{row['id']!r:.40}" if row.get("id") else "missing"


def _outcome(predictions: Mapping[Role, Mapping[str, Any]]) -> Outcome:
    teacher, distilled = predictions["teacher"]["correct"], predictions["distilled"]["correct"]
    if teacher:
        return "both" if distilled else "only_teacher"
    return "only_distilled" if distilled else "neither"
