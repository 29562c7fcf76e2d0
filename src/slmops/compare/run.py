"""compare: what distillation added, by the evaluations of teacher, untrained student, labels alone and distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.compare.bootstrap import Comparison, Intervals, intervals
from slmops.compare.config import CompareConfig
from slmops.compare.disagreements import Disagreements, by_stratum, disagreements
from slmops.compare.report import Findings, headline, render
from slmops.compare.rows import read_rows
from slmops.compare.subjects import Role, Subject, check_model, open_subjects
from slmops.pages import page
from slmops.progress import log

COMPARISON = "comparison.json"


def run(
    config: CompareConfig,
    *,
    teacher: Path,
    distilled: Path,
    comparison: Path,
    report: Path,
    untrained: Path | None = None,
    labels_only: Path | None = None,
    model: Path | None = None,
) -> Sidecar:
    """Set the evaluations side by side; write what was found to `comparison` and, for people, to `report`.

    Raises:
        ArtifactError: an input is missing or half-written, or `model` is not the student that was evaluated.
        DataError: the evaluations are not of the same rows, or were not judged alike.
    """
    subjects = open_subjects(teacher, untrained, labels_only, distilled)
    trained = artifacts.expect(model, "hf_model") if model else None
    if trained:
        check_model(trained, subjects["distilled"])
    parents = [*(subject.evaluation for subject in subjects.values()), *([trained] if trained else [])]

    with artifacts.writing(comparison, kind="comparison", step="compare", config=config, parents=parents) as draft:
        rows = read_rows(subjects, config.max_examples)
        log.info("%d rows, %d resamples of them for %d models", len(rows), config.num_resamples, len(subjects))
        found = Findings(subjects, rows, intervals(rows.correct, config), disagreements(rows), by_stratum(rows))
        draft.facts.update(
            _facts(subjects, found.intervals, found.disagreements), headline=headline(found.intervals).title
        )
        artifacts.write_json(draft.path / COMPARISON, draft.facts)
        page.write(report, render(config, found))

    log.info("compare: %s", draft.facts["headline"])
    return draft.sidecar


def _facts(subjects: dict[Role, Subject], found: Intervals, differ: Disagreements) -> dict[str, Any]:
    """Scalars, so that a dashboard can show them; a figure that is not known is left out."""
    facts: dict[str, Any] = {"num_rows": differ.num_rows}
    for role, accuracy in found.accuracy.items():
        facts |= {f"{role}_accuracy": accuracy.value}
        facts |= {f"{role}_accuracy_low": accuracy.low, f"{role}_accuracy_high": accuracy.high}
        for name in ("macro_f1", "rouge_l", "bleu", "perplexity", "expected_calibration_error"):
            value = subjects[role].number(name)
            facts |= {} if value is None else {f"{role}_{name}": value}
    for compared in found.comparisons:
        facts |= _compared(compared)
    facts |= {f"num_{outcome}_right": count for outcome, count in differ.counts.items()}
    return facts if differ.p_value is None else facts | {"mcnemar_p": differ.p_value}


def _compared(found: Comparison) -> dict[str, Any]:
    words = {f"{found.name}_finding": found.finding}
    if found.interval is None:
        return words
    ends = {f"{found.name}_low": found.interval.low, f"{found.name}_high": found.interval.high}
    return {found.name: found.interval.value, **ends, **words}
