"""gate: judge the candidate by what was measured, and write the verdict and a report for people.

A candidate that does not pass is a result, not an error: the step succeeds, and publish refuses anything but `pass`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from slmops import artifacts
from slmops.artifacts import Kind, Sidecar
from slmops.errors import explain_os_errors
from slmops.gate.config import GateConfig
from slmops.gate.judge import Subject, candidate_digest, judge
from slmops.gate.report import read_examples, render
from slmops.progress import log

VERDICT = "verdict.json"


def run(
    config: GateConfig,
    *,
    teacher_evaluation: Path,
    teacher_benchmark: Path,
    student_evaluation: Path,
    student_benchmark: Path,
    candidate_evaluation: Path,
    candidate_benchmark: Path,
    verdict: Path,
    report: Path,
) -> Sidecar:
    """Judge the candidate; an input that does not exist makes the verdict `not_run`.

    Raises:
        ArtifactError: an input exists, but is half-written, damaged or of another kind.
    """
    teacher = Subject("teacher", _find(teacher_evaluation, "evaluation"), _find(teacher_benchmark, "benchmark"))
    student = Subject("student", _find(student_evaluation, "evaluation"), _find(student_benchmark, "benchmark"))
    candidate = Subject("candidate", _find(candidate_evaluation, "evaluation"), _find(candidate_benchmark, "benchmark"))
    subjects = (teacher, student, candidate)
    parents = [sidecar for subject in subjects for sidecar in (subject.evaluation, subject.benchmark) if sidecar]

    with artifacts.writing(verdict, kind="verdict", step="gate", config=config, parents=parents) as draft:
        judgement = judge(config, teacher, student, candidate)
        draft.facts.update(
            verdict=judgement.verdict,
            reason=judgement.reason,
            variant=candidate.text("evaluation", "variant") or candidate.text("benchmark", "variant"),
            candidate_digest=candidate_digest(candidate),
            checks=[asdict(check) for check in judgement.checks],
        )
        (draft.path / VERDICT).write_text(json.dumps(draft.facts, indent=1) + "\n", encoding="utf-8")
        examples = read_examples(teacher_evaluation, candidate_evaluation)
        _write(report, render(config, judgement, subjects, examples))

    log.info(
        "gate: %s", judgement.verdict if judgement.verdict == "pass" else f"{judgement.verdict}: {judgement.reason}"
    )
    return draft.sidecar


def _find(path: Path, kind: Kind) -> Sidecar | None:
    return artifacts.expect(path, kind) if path.exists() else None


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
