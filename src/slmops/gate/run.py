"""gate: judge every variant by what was measured, and write the verdict and a report for people.

A candidate that does not pass is a result, not an error: the step succeeds, and publish refuses anything but `pass`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.gate.candidates import Measured, collect, find
from slmops.gate.champion import find_champion
from slmops.gate.config import GateConfig
from slmops.gate.matrix import judge_all
from slmops.gate.report import read_examples, render
from slmops.gate.subjects import Subject
from slmops.pages import page
from slmops.progress import log
from slmops.verdicts import VERDICT


def run(
    config: GateConfig,
    *,
    teacher_evaluation: Path,
    teacher_benchmark: Path,
    student_evaluation: Path,
    student_benchmark: Path,
    candidate_evaluations: Sequence[Path],
    candidate_benchmarks: Sequence[Path],
    verdict: Path,
    report: Path,
    champion_evaluation: Path | None = None,
) -> Sidecar:
    """Judge every variant that was measured, on every device class; what does not exist is `not_run`.

    Args:
        candidate_evaluations: of the variants, one each.
        candidate_benchmarks: of the variants, on this machine as it is and under the limits of device classes.
        champion_evaluation: of what the channel's nodes run now, on the same rows; it may say that there is nothing.

    Raises:
        ArtifactError: an input exists, but is half-written, damaged or of another kind.
    """
    champion = find_champion(champion_evaluation, config)
    others = {
        "teacher": find(teacher_evaluation, "evaluation"),
        "student": find(student_evaluation, "evaluation"),
        "champion": champion.opponent,
    }
    benchmarks = {"teacher": find(teacher_benchmark, "benchmark"), "student": find(student_benchmark, "benchmark")}
    teacher, student = (_subject(role, others, benchmarks) for role in ("teacher", "student"))
    candidates = collect(candidate_evaluations, candidate_benchmarks, others)
    measured = [others["teacher"], others["student"], *benchmarks.values()]
    parents = [found.sidecar for found in measured if found] + ([champion.sidecar] if champion.sidecar else [])
    parents += [sidecar for candidate in candidates for sidecar in candidate.sidecars]

    with artifacts.writing(verdict, kind="verdict", step="gate", config=config, parents=parents) as draft:
        matrix = judge_all(config, teacher, student, candidates)
        if champion.passed_over and matrix.verdict == "pass":
            matrix = replace(matrix, reason=f"{matrix.reason}; not held against the champion: {champion.passed_over}")
        draft.facts |= matrix.facts()
        artifacts.write_json(draft.path / VERDICT, draft.facts)
        shown = next(candidate for candidate in candidates if candidate.variant == matrix.headline.variant)
        examples = read_examples(teacher_evaluation, shown.answers)
        page.write(report, render(config, matrix, teacher, student, champion, candidates, examples))

    if champion.said:
        log.info("champion: %s", champion.said)
    log.info("gate: %s", matrix.verdict if matrix.verdict == "pass" else f"{matrix.verdict}: {matrix.reason}")
    return draft.sidecar


def _subject(
    role: Literal["teacher", "student"],
    evaluations: Mapping[str, Measured | None],
    benchmarks: Mapping[str, Measured | None],
) -> Subject:
    evaluation, benchmark = evaluations[role], benchmarks[role]
    return Subject(role, evaluation.sidecar if evaluation else None, benchmark.sidecar if benchmark else None)
