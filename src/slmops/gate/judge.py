"""The gate's decision: a pure function of what was measured. What was not measured never counts as good."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from slmops.artifacts import Sidecar
from slmops.errors import ArtifactError
from slmops.gate.config import GateConfig

Verdict = Literal["pass", "fail", "not_run"]
Source = Literal["evaluation", "benchmark"]


@dataclass(frozen=True)
class Subject:
    """One model and what was measured of it; None for what does not exist."""

    role: Literal["teacher", "student", "candidate"]
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
class Check:
    """One threshold. `value` is None where nothing could be compared."""

    name: str
    value: float | None
    threshold: float
    verdict: Verdict
    detail: str


@dataclass(frozen=True)
class Judgement:
    """All checks, and what follows from them in one line."""

    verdict: Verdict
    reason: str
    checks: tuple[Check, ...]


def judge(config: GateConfig, teacher: Subject, student: Subject, candidate: Subject) -> Judgement:
    """Any check that could not run gives `not_run`, else any that failed gives `fail`, else `pass`."""
    checks = (
        _rows(config, teacher, candidate),
        _check(
            "accuracy",
            lambda: _accuracy(candidate, config.min_rows),
            config.min_accuracy,
            "accuracy {value}, at least {threshold} wanted",
        ),
        _check(
            "accuracy_kept",
            lambda: _accuracy_kept(teacher, candidate, config.min_rows),
            config.min_accuracy_kept,
            "{value} of the teacher's accuracy kept, at least {threshold} wanted",
        ),
        _check(
            "latency_saved",
            lambda: _latency_saved(teacher, candidate),
            config.min_latency_saved,
            "{value} of the teacher's median time per response saved, at least {threshold} wanted",
        ),
        _check(
            "memory_saved",
            lambda: _memory_saved(teacher, candidate),
            config.min_memory_saved,
            "{value} of the teacher's peak memory saved, above the runtime's floor, at least {threshold} wanted",
        ),
        _check(
            "size_saved",
            lambda: _size_saved(student, candidate),
            config.min_size_saved,
            "{value} of the full-precision student's size saved, at least {threshold} wanted",
        ),
    )
    verdict: Verdict = "pass"
    if any(check.verdict == "not_run" for check in checks):
        verdict = "not_run"
    elif any(check.verdict == "fail" for check in checks):
        verdict = "fail"
    return Judgement(verdict, _reason(verdict, checks), checks)


def candidate_digest(candidate: Subject) -> str | None:
    """The digest of the one model that was measured, or None if that is not known."""
    found = {candidate.text("evaluation", "model_digest"), candidate.text("benchmark", "model_digest")} - {None}
    return found.pop() if len(found) == 1 else None


def _check(name: str, measure: Callable[[], float], threshold: float, detail: str) -> Check:
    try:
        value = round(measure(), 6)  # 0.828 / 0.9 is 0.92 for a person, and a hair less in binary
    except ArtifactError as error:
        return Check(name, None, threshold, "not_run", str(error))
    verdict: Verdict = "pass" if value >= threshold else "fail"
    shown, wanted = _distinct(value, threshold)
    return Check(name, value, threshold, verdict, detail.format(value=shown, threshold=wanted))


def _rows(config: GateConfig, teacher: Subject, candidate: Subject) -> Check:
    try:
        num_rows = min(_number(subject, "evaluation", "num_rows") for subject in (teacher, candidate))
        _enough_rows(num_rows, config.min_rows)
    except ArtifactError as error:
        return Check("rows", None, config.min_rows, "not_run", str(error))
    detail = f"{num_rows:,.0f} rows evaluated, at least {config.min_rows:,} wanted"
    return Check("rows", num_rows, config.min_rows, "pass", detail)


def _accuracy(candidate: Subject, min_rows: int) -> float:
    _same_model(candidate)
    _enough_rows(_number(candidate, "evaluation", "num_rows"), min_rows)
    accuracy = _number(candidate, "evaluation", "accuracy")
    if not 0 <= accuracy <= 1:
        raise ArtifactError(f"candidate_evaluation has an accuracy of {accuracy}, which is not between 0 and 1")
    return accuracy


def _accuracy_kept(teacher: Subject, candidate: Subject, min_rows: int) -> float:
    _same_model(teacher)
    _same_dataset("evaluation", teacher, candidate)
    _same_fact("evaluation", "num_rows", teacher, candidate)
    _same_fact("evaluation", "match", teacher, candidate)
    return _accuracy(candidate, min_rows) / _positive(teacher, "evaluation", "accuracy")


def _latency_saved(teacher: Subject, candidate: Subject) -> float:
    _same_model(teacher)
    _same_model(candidate)
    _same_dataset("benchmark", teacher, candidate)
    _same_fact("benchmark", "cpu", teacher, candidate)
    _same_fact("benchmark", "num_threads", teacher, candidate)
    name = "latency_ms_p50"
    return 1 - _positive(candidate, "benchmark", name) / _positive(teacher, "benchmark", name)


def _memory_saved(teacher: Subject, candidate: Subject) -> float:
    """The candidate's floor is taken off: no model in that runtime could need less. The raw share is in the report."""
    _same_model(teacher)
    _same_model(candidate)
    peak = _positive(candidate, "benchmark", "peak_rss_bytes")
    floor = _number(candidate, "benchmark", "runtime_floor_bytes")
    if not 0 <= floor <= peak:
        raise ArtifactError(
            f"candidate_benchmark has a runtime floor of {floor:,.0f} bytes and a peak of {peak:,.0f}; the floor is "
            "part of the peak, so run the benchmark again"
        )
    return 1 - (peak - floor) / _positive(teacher, "benchmark", "peak_rss_bytes")


def _size_saved(student: Subject, candidate: Subject) -> float:
    student.sidecar("evaluation")
    _same_model(student)
    _same_model(candidate)
    return 1 - _positive(candidate, "benchmark", "size_bytes") / _positive(student, "benchmark", "size_bytes")


def _same_model(subject: Subject) -> None:
    if subject.evaluation is None or subject.benchmark is None:
        return
    for name in ("model_digest", "variant"):
        evaluated, benchmarked = _fact(subject, "evaluation", name), _fact(subject, "benchmark", name)
        if evaluated != benchmarked:
            raise ArtifactError(
                f"the {subject.role} that was evaluated is not the one that was benchmarked: "
                f"{name} {evaluated:.12} and {benchmarked:.12}"
            )


def _same_dataset(source: Source, teacher: Subject, candidate: Subject) -> None:
    if _dataset(teacher, source) != _dataset(candidate, source):
        verb = "evaluated" if source == "evaluation" else "benchmarked"
        raise ArtifactError(f"teacher and candidate were {verb} on different rows: their datasets have other digests")


def _dataset(subject: Subject, source: Source) -> str:
    sidecar = subject.sidecar(source)
    for ancestor in sidecar.ancestors:
        if ancestor.kind == "chat_dataset" and ancestor.digest in sidecar.parents:
            return ancestor.digest
    raise ArtifactError(f"{subject.role}_{source} does not say which rows it used")


def _same_fact(source: Source, name: str, teacher: Subject, candidate: Subject) -> None:
    first, second = _fact(teacher, source, name), _fact(candidate, source, name)
    if first != second:
        raise ArtifactError(f"teacher and candidate cannot be compared: {name} was {first} and {second}")


def _fact(subject: Subject, source: Source, name: str) -> str:
    value = subject.sidecar(source).facts.get(name)
    if value is None or value == "":
        raise ArtifactError(f"{subject.role}_{source} has no {name}")
    return str(value)


def _number(subject: Subject, source: Source, name: str) -> float:
    found = _fact(subject, source, name)
    value = subject.number(source, name)
    if value is None:
        raise ArtifactError(f"{subject.role}_{source} has {name} {found:.20}, which is not a finite number")
    return value


def _positive(subject: Subject, source: Source, name: str) -> float:
    value = _number(subject, source, name)
    if value <= 0:
        raise ArtifactError(f"{subject.role}_{source} has {name} {value:g}; nothing can be compared with that")
    return value


def _enough_rows(num_rows: float, min_rows: int) -> None:
    if num_rows < min_rows:
        raise ArtifactError(f"{num_rows:,.0f} rows evaluated say too little, at least {min_rows:,} wanted")


def _distinct(value: float, threshold: float) -> tuple[str, str]:
    """Both numbers with three decimals, or as many as it takes to tell them apart."""
    digits = 3
    while digits < 6 and value != threshold and f"{value:.{digits}f}" == f"{threshold:.{digits}f}":
        digits += 1
    return f"{value:.{digits}f}", f"{threshold:.{digits}f}"


def _reason(verdict: Verdict, checks: tuple[Check, ...]) -> str:
    if verdict == "pass":
        return f"all {len(checks)} checks hold"
    names: dict[str, list[str]] = {}
    for check in checks:
        if check.verdict == verdict:
            names.setdefault(check.detail, []).append(check.name)
    if verdict == "fail":
        return "; ".join(names)
    return "; ".join(f"{detail} ({', '.join(affected)})" for detail, affected in names.items())
