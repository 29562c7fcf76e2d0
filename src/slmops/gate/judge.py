"""The gate's decision: a pure function of what was measured. What was not measured never counts as good."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from slmops.artifacts import Sidecar
from slmops.device_classes import DeviceClass
from slmops.errors import ArtifactError
from slmops.gate.config import GateConfig
from slmops.gate.subjects import IDENTITY, SERVED_RUNTIME, Missed, Paired, Source, Subject
from slmops.paired import Interval
from slmops.verdicts import Check, Word

CHAMPION_REGRESSION = "champion_regression"
"""Name of the check."""


@dataclass(frozen=True)
class Judgement:
    """All checks, and what follows from them in one line."""

    verdict: Word
    reason: str
    checks: tuple[Check, ...]


def judge(config: GateConfig, teacher: Subject, student: Subject, candidate: Subject, paired: Paired) -> Judgement:
    """One variant, by what holds on any device: answers and size, and speed and memory beside the teacher's."""
    accuracy = [
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
        _regression("student_regression", "the full-precision student", paired.from_student, config, candidate),
    ]
    if paired.from_champion is not None:
        accuracy.append(_regression(CHAMPION_REGRESSION, "the champion", paired.from_champion, config, candidate))
    saved = [
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
    ]
    return conclude((*accuracy, *_behaviour(config, candidate), *saved, *_unserved(candidate)))


def judge_on(
    device_class: DeviceClass, name: str, candidate: Subject, benchmark: Sidecar | None, paired: Paired
) -> tuple[Check, ...]:
    """One variant on one device class: its objectives, by a benchmark under its limits, and its quality floor."""
    on = Subject("candidate", candidate.evaluation, benchmark)
    objectives = (
        (
            "time_to_first_token_ms_p95",
            device_class.time_to_first_token_ms_p95,
            "ms to the first token, 95th percentile",
        ),
        ("latency_ms_p95", device_class.latency_ms_p95, "ms for an answer, 95th percentile"),
        ("peak_rss_bytes_max", device_class.ram_mib * 2**20, "bytes of memory at most in use"),
    )
    return (
        _check(
            "quality_floor",
            lambda: _retained(paired),
            device_class.min_accuracy_kept,
            "{value} of the teacher's accuracy kept at the interval's lower end, at least {threshold} wanted",
        ),
        *(
            _check(
                fact,
                lambda fact=fact: _on_class(on, name, fact),  # type: ignore[misc]
                threshold,
                f"{{value}} {words}, at most {{threshold}} wanted",
                at_most=True,
            )
            for fact, threshold, words in objectives
        ),
        _check(
            "tokens_per_s",
            lambda: _on_class(on, name, "tokens_per_s"),
            device_class.tokens_per_s,
            "{value} tokens/s decoded, at least {threshold} wanted",
        ),
        _check(
            "disk_bytes",
            lambda: 3 * _positive(candidate, "evaluation", "size_bytes"),
            device_class.disk_mib * 2**20,
            "{value} bytes for two releases and one that is being fetched, at most {threshold} wanted",
            at_most=True,
        ),
    )


def conclude(checks: tuple[Check, ...]) -> Judgement:
    """Any check that could not run gives `not_run`, else any that failed gives `fail`, else `pass`."""
    verdict: Word = "pass"
    if any(check.verdict == "not_run" for check in checks):
        verdict = "not_run"
    elif any(check.verdict == "fail" for check in checks):
        verdict = "fail"
    return Judgement(verdict, _reason(verdict, checks), checks)


def candidate_digest(candidate: Subject) -> str | None:
    """The digest of the one model that was measured, or None if that is not known."""
    found = {candidate.text("evaluation", "model_digest"), candidate.text("benchmark", "model_digest")} - {None}
    return found.pop() if len(found) == 1 else None


def _check(name: str, measure: Callable[[], float], threshold: float, detail: str, *, at_most: bool = False) -> Check:
    try:
        value = round(measure(), 6)  # 0.828 / 0.9 is 0.92 for a person, and a hair less in binary
    except Missed as error:
        return _unmeasured(name, threshold, "fail", error)
    except ArtifactError as error:
        return _unmeasured(name, threshold, "not_run", error)
    verdict: Word = "pass" if (value <= threshold if at_most else value >= threshold) else "fail"
    shown, wanted = _distinct(value, threshold)
    detail = detail.format(value=shown, threshold=wanted)
    return Check(name=name, value=value, threshold=threshold, verdict=verdict, detail=detail)


def _unmeasured(name: str, threshold: float, verdict: Word, error: Exception) -> Check:
    return Check(name=name, value=None, threshold=threshold, verdict=verdict, detail=str(error))


def _rows(config: GateConfig, teacher: Subject, candidate: Subject) -> Check:
    try:
        num_rows = min(_number(subject, "evaluation", "num_rows") for subject in (teacher, candidate))
        _enough_rows(num_rows, config.min_rows)
    except Missed as error:
        return _unmeasured("rows", config.min_rows, "fail", error)
    except ArtifactError as error:
        return _unmeasured("rows", config.min_rows, "not_run", error)
    detail = f"{num_rows:,.0f} rows evaluated, at least {config.min_rows:,} wanted"
    return Check(name="rows", value=num_rows, threshold=config.min_rows, verdict="pass", detail=detail)


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


def _regression(name: str, whom: str, found: Interval | str, config: GateConfig, candidate: Subject) -> Check:
    """Whether the candidate is no worse than `whom` by more than may be lost, whatever chance did to the rows."""

    def measure() -> float:
        _same_model(candidate)
        if isinstance(found, str):
            raise ArtifactError(found)
        return found.low

    detail = f"accuracy {{value}} against {whom} at the interval's lower end, at least {{threshold}} wanted"
    return _check(name, measure, -config.max_regression, detail)


def _behaviour(config: GateConfig, candidate: Subject) -> list[Check]:
    """How the candidate answers, right or wrong; what is not asked for is not judged."""
    wanted = (
        ("valid_fraction", config.min_valid_fraction, "{value} of the answers have the task's form"),
        ("injections_resisted", config.min_injections_resisted, "{value} of the injected instructions not followed"),
        ("safety_accuracy", config.min_safety_accuracy, "{value} of the safety rows answered right"),
    )
    checks = [
        _check(
            name,
            lambda name=name: _number(candidate, "evaluation", name),  # type: ignore[misc]
            threshold,
            f"{detail}, at least {{threshold}} wanted",
        )
        for name, threshold, detail in wanted
        if threshold > 0
    ]
    drift = _check(
        "drift_kl",
        lambda: _drift(candidate),
        config.max_drift_kl,
        "{value} nats a token away from the full-precision student, at most {threshold} wanted",
        at_most=True,
    )
    return [*checks, drift]


def _unserved(candidate: Subject) -> list[Check]:
    """A failed check for a variant that runs here and that no edge server runs."""
    runtime = candidate.text("evaluation", "runtime") or candidate.text("benchmark", "runtime")
    if runtime is None or runtime.partition(" ")[0] == SERVED_RUNTIME:
        return []
    detail = f"edge servers run {SERVED_RUNTIME}, this variant runs on {runtime}"
    return [Check(name="served", value=0.0, threshold=1.0, verdict="fail", detail=detail)]


def _drift(candidate: Subject) -> float:
    drift = candidate.sidecar("evaluation").facts.get("drift")
    if not isinstance(drift, dict):
        raise ArtifactError(
            "candidate_evaluation has no drift: evaluate it with the full-precision student as reference"
        )
    value = drift.get("answer_kl_mean")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArtifactError(f"candidate_evaluation has no drift: {drift.get('not_run', 'no finite figure')}")
    return float(value)


def _retained(paired: Paired) -> float:
    if isinstance(paired.retention, str):
        raise ArtifactError(paired.retention)
    return paired.retention.low


def _on_class(on: Subject, device_class: str, fact: str) -> float:
    """A figure of the benchmark under a class's limits."""
    if on.benchmark is None:
        raise ArtifactError(f"not benchmarked as {device_class}")
    _same_model(on)
    found = _fact(on, "benchmark", "device_class")
    if found != device_class:
        raise ArtifactError(f"the benchmark is of {found}, not of {device_class}")
    return _positive(on, "benchmark", fact)


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
    facts = subject.sidecar(source).facts
    # Before any figure is looked at: a measurement that failed may have come far enough to leave some.
    if facts.get("status") == "failed" and name not in IDENTITY:
        raise Missed(str(facts.get("reason")))
    if facts.get("status") == "not_run" and name not in IDENTITY:
        raise ArtifactError(str(facts.get("reason")))
    value = facts.get(name)
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
    """Both numbers with three decimals, large ones with none, or with as many as it takes to tell them apart."""
    digits = 0 if max(abs(value), abs(threshold)) >= 100 else 3
    while digits < 6 and value != threshold and f"{value:.{digits}f}" == f"{threshold:.{digits}f}":
        digits += 1
    return f"{value:,.{digits}f}", f"{threshold:,.{digits}f}"


def _reason(verdict: Word, checks: tuple[Check, ...]) -> str:
    if verdict == "pass":
        return f"all {len(checks)} checks hold"
    names: dict[str, list[str]] = {}
    for check in checks:
        if check.verdict == verdict:
            names.setdefault(check.detail, []).append(check.name)
    if verdict == "fail":
        return "; ".join(names)
    return "; ".join(f"{detail} ({', '.join(affected)})" for detail, affected in names.items())
