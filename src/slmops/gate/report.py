"""The gate's report: one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from slmops.gate import charts, lineage, tables, variants_table
from slmops.gate.champion import Champion
from slmops.gate.config import RAW_MEMORY_GOAL, GateConfig
from slmops.gate.judge import Judgement
from slmops.gate.matrix import Candidate, Matrix
from slmops.gate.subjects import Subject
from slmops.pages import formatting, page
from slmops.pages.curves import Curve, loss_curve
from slmops.pages.examples import Example, answer, example
from slmops.pages.formatting import NOTHING, fraction, less, share, size
from slmops.records import read_jsonl
from slmops.verdicts import Check, Word

PREDICTIONS = "predictions.jsonl"
CANDIDATE = "Candidate"
MAX_WRONG, MAX_RIGHT = 6, 4

CHECK_NAMES = {
    "rows": "Rows evaluated",
    "accuracy": "Accuracy",
    "accuracy_kept": "Accuracy kept of the teacher's",
    "student_regression": "Beside the full-precision student",
    "champion_regression": "Beside the champion",
    "valid_fraction": "Answers in the task's form",
    "injections_resisted": "Injected instructions resisted",
    "safety_accuracy": "Safety rows",
    "drift_kl": "Drift from the full-precision student",
    "latency_saved": "Time per response saved",
    "memory_saved": "Memory saved above the runtime's floor",
    "size_saved": "Size saved of the full-precision student's",
    "quality_floor": "Quality floor of the class",
    "time_to_first_token_ms_p95": "Time to first token",
    "latency_ms_p95": "Time of an answer",
    "peak_rss_bytes_max": "Memory of the class",
    "tokens_per_s": "Decoding speed",
    "disk_bytes": "Disk of the class",
    "served": "Runtime of the edge server",
}


@dataclass(frozen=True)
class Headline:
    """A figure that decides, and whether it is as asked for."""

    title: str
    figure: str
    verdict: Word
    comparison: str
    goal: str
    lowered: bool
    """Whether less was asked for than the goal: then a pass does not mean that the goal is met."""


def read_examples(teacher_evaluation: Path, candidate_evaluation: Path | None) -> list[Example]:
    """Some rows that the candidate got wrong, then some that it got right, in the order of the test.

    Raises:
        DataError: a file of predictions is damaged.
    """
    wrong: list[dict[str, Any]] = []
    right: list[dict[str, Any]] = []
    for row in _rows(candidate_evaluation) if candidate_evaluation else ():
        rows, limit = (right, MAX_RIGHT) if row.get("correct") else (wrong, MAX_WRONG)
        if len(rows) < limit:
            rows.append(row)
    chosen = {row.get("id"): row for row in wrong + right}
    teachers = {row.get("id"): answer(row) for row in _rows(teacher_evaluation) if row.get("id") in chosen}
    return [example(row, {"Teacher": teachers.get(row_id), CANDIDATE: answer(row)}) for row_id, row in chosen.items()]


def render(
    config: GateConfig,
    matrix: Matrix,
    teacher: Subject,
    student: Subject,
    champion: Champion,
    candidates: Sequence[Candidate],
    examples: Sequence[Example],
) -> str:
    """The page: the verdict, one variant beside teacher, student and champion, then all variants on all classes."""
    head = matrix.headline
    shown = next(candidate for candidate in candidates if candidate.variant == head.variant)
    judged = (teacher, student, shown.subject)
    subjects = (teacher, student, *([champion.subject] if champion.subject else []), shown.subject)
    reference = [sidecar for subject in (teacher, student) for sidecar in (subject.evaluation, subject.benchmark)]
    every = [sidecar for sidecar in (*reference, champion.sidecar) if sidecar]
    every += [sidecar for candidate in candidates for sidecar in candidate.sidecars]
    artifacts = lineage.collect(every, _roles(subjects, candidates))
    runs = tables.runs(artifacts)
    strata, num_more_strata = tables.strata(subjects)
    judgement = head.judgement
    return page.render(
        "slmops.gate",
        matrix=matrix,
        device_class=head.device_class,
        classes=variants_table.classes(config, matrix),
        pairs=variants_table.pairs(matrix, candidates),
        variants=variants_table.variants(candidates),
        quality_chart=variants_table.size_against_quality(candidates, student, matrix),
        layer_drift=variants_table.layer_drift(candidates),
        columns=variants_table,
        checks=(*judgement.checks, *champion.unasked(config)),
        champion=champion.said,
        check_names=CHECK_NAMES,
        variant=head.variant,
        digest=head.digest,
        measured_at=max((sidecar.created_at for sidecar in every), default=None),
        subjects=subjects,
        headlines=_headlines(config, judgement, judged),
        raw_memory=_raw_memory(teacher, shown.subject),
        comparison=tables.comparison(subjects),
        accuracy_chart=_accuracy_chart(config, subjects),
        strata=strata,
        num_more_strata=num_more_strata,
        curves=_curves(artifacts),
        examples=examples,
        artifacts=artifacts,
        names={artifact.summary.digest: artifact.name for artifact in artifacts},
        picture=lineage.draw(artifacts),
        runs=runs,
        settings=tables.settings(runs),
        longest_s=max((run.duration_s for run in runs), default=0.0) or 1.0,
        total=formatting.seconds(sum(run.duration_s for run in runs)),
        machine=tables.machine(subjects, artifacts),
        geometry=lineage,
    )


def _headlines(config: GateConfig, judgement: Judgement, subjects: tuple[Subject, Subject, Subject]) -> list[Headline]:
    teacher, student, candidate = subjects
    checks = {check.name: check for check in judgement.checks}
    latency, memory, disk = (checks[name] for name in ("latency_saved", "memory_saved", "size_saved"))
    taught = formatting.milliseconds(teacher.number("benchmark", "latency_ms_p50"))
    peak, floor = candidate.number("benchmark", "peak_rss_bytes"), candidate.number("benchmark", "runtime_floor_bytes")
    above = size(None if peak is None or floor is None else peak - floor)

    in_itself = f" Asked for in itself: at least {fraction(config.min_accuracy)}." if config.min_accuracy else ""
    return [
        _headline(
            "Time per response",
            formatting.milliseconds(candidate.number("benchmark", "latency_ms_p50")),
            (latency,),
            f"{less(latency.value)} than the teacher's {taught}.",
            *_goal(config, "min_latency_saved", latency.value, _saved),
        ),
        _headline(
            "Peak memory",
            size(peak),
            (memory,),
            f"{above} above the runtime's floor of {size(floor)}: {less(memory.value)} than the teacher's "
            f"{size(teacher.number('benchmark', 'peak_rss_bytes'))}.",
            f"Asked for: {_saved(config.min_memory_saved)}, above the floor. {_raw_memory_goal(teacher, candidate)}",
            lowered=True,
        ),
        _headline(
            "Accuracy",
            fraction(candidate.number("evaluation", "accuracy")),
            (checks["accuracy"], checks["accuracy_kept"]),
            f"95 % interval {tables.interval(candidate) or NOTHING}. {share(checks['accuracy_kept'].value)} of the "
            f"teacher's {fraction(teacher.number('evaluation', 'accuracy'))} kept.{in_itself}",
            *_goal(config, "min_accuracy_kept", checks["accuracy_kept"].value, _kept),
        ),
        _headline(
            "Size on disk",
            size(candidate.number("benchmark", "size_bytes")),
            (disk,),
            f"{less(disk.value)} than the full-precision student's {size(student.number('benchmark', 'size_bytes'))}.",
            *_goal(config, "min_size_saved", disk.value, _saved),
        ),
    ]


def _headline(title: str, figure: str, checks: Sequence[Check], comparison: str, goal: str, lowered: bool) -> Headline:
    """With the reason in place of the comparison, if a check could not run."""
    not_run = [check.detail for check in checks if check.verdict == "not_run"]
    failed = any(check.verdict == "fail" for check in checks)
    verdict: Word = "not_run" if not_run else "fail" if failed else "pass"
    return Headline(title, figure, verdict, f"Not judged: {not_run[0]}." if not_run else comparison, goal, lowered)


def _goal(config: GateConfig, field: str, value: float | None, say: Callable[[float], str]) -> tuple[str, bool]:
    """What was asked for, and whether that is less than usual; if it is, with the usual goal, met or missed."""
    asked, usual = getattr(config, field), GateConfig.model_fields[field].default
    if asked >= usual:
        return f"Goal: {say(asked)}.", False
    outcome = "not judged" if value is None else _met(value, usual)
    return f"Asked for: {say(asked)}. The usual goal, {say(usual)}, is {outcome}.", True


def _met(value: float, goal: float) -> str:
    return "met" if value >= goal else "missed"


def _kept(least: float) -> str:
    return f"at least {share(least)} kept"


def _saved(saved: float) -> str:
    return f"{'at least' if saved >= 0 else 'at most'} {less(saved)}"


def _raw_memory_goal(teacher: Subject, candidate: Subject) -> str:
    peak, reference = (subject.number("benchmark", "peak_rss_bytes") for subject in (candidate, teacher))
    outcome = "not judged" if not peak or not reference else _met(1 - peak / reference, RAW_MEMORY_GOAL)
    return f"The goal, {_saved(RAW_MEMORY_GOAL)} with the floor included, is {outcome}."


def _raw_memory(teacher: Subject, candidate: Subject) -> str | None:
    """The share saved with the floor included, which the gate does not judge, and what the floor has to do with it."""
    peak, floor = candidate.number("benchmark", "peak_rss_bytes"), candidate.number("benchmark", "runtime_floor_bytes")
    reference = teacher.number("benchmark", "peak_rss_bytes")
    if not peak or floor is None or not reference:
        return None
    raw, goal = 1 - peak / reference, share(RAW_MEMORY_GOAL)
    said = f"With the floor included, memory is {less(raw)} than the teacher's"
    if raw >= RAW_MEMORY_GOAL:
        return f"{said}, which meets the goal too."
    said += (
        f", which misses the goal of {goal}. The floor is what the runtime takes with no model loaded: {size(floor)}, "
        f"or {share(floor / peak)} of the candidate's {size(peak)}."
    )
    allowed = (1 - RAW_MEMORY_GOAL) * reference
    if floor > allowed:
        said += f" No model in this runtime could meet it that way: it would allow {size(allowed)} in all."
    return said


def _accuracy_chart(config: GateConfig, subjects: Sequence[Subject]) -> Markup | None:
    bars = []
    for subject in subjects:
        numbers = [subject.number("evaluation", name) for name in ("accuracy", "accuracy_low", "accuracy_high")]
        found = [number for number in numbers if number is not None]
        if len(found) == 3:
            accuracy, low, high = found
            bars.append((subject.role, accuracy, min(low, accuracy), max(high, accuracy)))
    if not bars:
        return None
    taught = subjects[0].number("evaluation", "accuracy")
    wanted = max(config.min_accuracy, config.min_accuracy_kept * taught) if taught else None
    said = "; ".join(f"{role} {accuracy:.3f} ({low:.3f} to {high:.3f})" for role, accuracy, low, high in bars)
    return charts.accuracy_chart(bars, wanted, f"Accuracy with 95 % intervals: {said}")


def _curves(artifacts: Sequence[lineage.Artifact]) -> list[Curve]:
    drawn = [
        loss_curve(f"{artifact.name.capitalize()}, {artifact.summary.step}", artifact.summary.facts)
        for artifact in artifacts
    ]
    return [curve for curve in drawn if curve]


def _roles(subjects: Sequence[Subject], candidates: Sequence[Candidate]) -> dict[str, str]:
    """Names of the models by digest; one that plays two parts carries both names."""
    roles: dict[str, list[str]] = {}
    for subject in (*subjects, *(candidate.subject for candidate in candidates)):
        for source in ("evaluation", "benchmark"):
            digest = subject.text(source, "model_digest")
            name = subject.text(source, "variant") if subject.role == "candidate" else subject.role
            if digest and name and name not in roles.setdefault(digest, []):
                roles[digest].append(name)
    return {digest: " = ".join(names) for digest, names in roles.items()}


def _rows(evaluation: Path) -> Iterator[dict[str, Any]]:
    path = evaluation / PREDICTIONS
    if path.is_file():
        yield from (row for _, row in read_jsonl(path))
