"""From the measurements that a gate was given to candidates: what belongs to which variant, and pairs of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slmops import artifacts
from slmops.artifacts import Kind, Sidecar
from slmops.errors import ArtifactError, DataError
from slmops.gate.matrix import THIS_MACHINE, Candidate
from slmops.gate.subjects import Paired, Subject
from slmops.paired import Interval, interval
from slmops.paired import Kind as Figure
from slmops.records import read_jsonl

PREDICTIONS = "predictions.jsonl"
MIN_ROWS = 2


@dataclass(frozen=True)
class Measured:
    """One measurement and where it is."""

    path: Path
    sidecar: Sidecar


def find(path: Path | None, kind: Kind) -> Measured | None:
    """The measurement at `path`; None if there is none.

    Raises:
        ArtifactError: it exists, but is half-written, damaged or of another kind.
    """
    return Measured(path, artifacts.expect(path, kind)) if path and path.exists() else None


def collect(
    evaluations: Sequence[Path], benchmarks: Sequence[Path], others: Mapping[str, Measured | None]
) -> list[Candidate]:
    """A candidate for each variant that was measured.

    Args:
        others: the evaluations of `teacher`, `student` and `champion`, against which each candidate is held.

    Raises:
        ArtifactError: a measurement is damaged, or there are several of one thing.
    """
    evaluated = _by_variant([found for path in evaluations if (found := find(path, "evaluation"))])
    benchmarked: dict[str, dict[str, Sidecar]] = {}
    for path in benchmarks:
        if found := find(path, "benchmark"):
            facts = found.sidecar.facts
            on = benchmarked.setdefault(str(facts.get("variant")), {})
            device_class = str(facts.get("device_class") or THIS_MACHINE)
            if device_class in on:
                as_what = device_class or "this machine"
                raise ArtifactError(f"{path}: {facts.get('variant')} was benchmarked twice as {as_what}; give one")
            on[device_class] = found.sidecar
    names = dict.fromkeys([*evaluated, *benchmarked]) or ["candidate"]  # with nothing measured of it
    return [_candidate(name, evaluated.get(name), benchmarked.get(name, {}), others) for name in names]


def _by_variant(measured: Sequence[Measured]) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for each in measured:
        name = str(each.sidecar.facts.get("variant"))
        if name in found:
            raise ArtifactError(f"{each.path}: {name} was evaluated twice, the other is {found[name].path}; give one")
        found[name] = each
    return found


def _candidate(
    name: str, evaluation: Measured | None, benchmarks: Mapping[str, Sidecar], others: Mapping[str, Measured | None]
) -> Candidate:
    subject = Subject("candidate", evaluation.sidecar if evaluation else None, benchmarks.get(THIS_MACHINE))
    on_classes = {device_class: found for device_class, found in benchmarks.items() if device_class != THIS_MACHINE}
    champion = others.get("champion")
    paired = Paired(
        retention=_compare("retention", evaluation, others.get("teacher"), "teacher"),
        from_student=_compare("difference", evaluation, others.get("student"), "student"),
        from_champion=_compare("difference", evaluation, champion, "champion") if champion else None,
    )
    answers = evaluation.path if evaluation else None
    return Candidate(name, _provider(name, subject, on_classes), subject, on_classes, paired, answers)


def _provider(name: str, subject: Subject, on_classes: Mapping[str, Sidecar]) -> str:
    """What quantize built the variant for, as the lineage says."""
    for sidecar in (subject.evaluation, subject.benchmark, *on_classes.values()):
        for ancestor in sidecar.ancestors if sidecar else ():
            if ancestor.kind == "variants" and name in ancestor.facts.get("variants", {}):
                return str(ancestor.facts["variants"][name].get("execution_provider", "cpu"))
    return "cpu"


def _compare(kind: Figure, one: Measured | None, other: Measured | None, whom: str) -> Interval | str:
    """The interval, or why there is none."""
    if one is None or other is None:
        return f"{'candidate' if one is None else whom}_evaluation does not exist"
    for who, each in (("candidate", one), (whom, other)):
        if each.sidecar.facts.get("status") in ("not_run", "failed"):
            return f"the {who} was not evaluated: {each.sidecar.facts.get('reason')}"
    if one.sidecar.facts.get("match") != other.sidecar.facts.get("match"):
        return f"candidate and {whom} were not judged by the same match"
    first, second = _answers(one), _answers(other)
    if first.keys() != second.keys() or len(first) < MIN_ROWS:
        return f"candidate and {whom} were not evaluated on the same rows, two or more"
    if kind == "retention" and not any(second.values()):
        return f"the {whom} answers no row right, and a share of nothing is no number"
    import numpy as np

    return interval(kind, np.array(list(first.values())), np.array(list(second.values())))


def _answers(measured: Measured) -> dict[str, bool]:
    """Whether each row was answered right, by its line and its id: the same rows in the same order have the same keys.

    Raises:
        DataError: a line is no prediction.
    """
    path = measured.path / PREDICTIONS
    found: dict[str, bool] = {}
    if not path.is_file():
        return found
    for number, row in read_jsonl(path):
        if not isinstance(row.get("correct"), bool) or "id" not in row:
            raise DataError(f"{path}:{number}: is no prediction; run evaluate again")
        found[f"{number} {row['id']}"] = row["correct"]
    return found
