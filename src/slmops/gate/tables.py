"""What the report shows in tables, in words and numbers that are ready to print."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from slmops.artifacts import Summary
from slmops.config import Config
from slmops.gate.lineage import Artifact
from slmops.gate.subjects import Source, Subject
from slmops.pages import formatting
from slmops.pages.formatting import NOTHING

MAX_STRATA = 30


@dataclass(frozen=True)
class Cell:
    """A figure, and how it compares with the teacher's."""

    value: str
    ratio: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a measure, and a cell per subject."""

    measure: str
    note: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Stratum:
    """Accuracy of each subject on the rows of one group, as text and as a share for its bar."""

    name: str
    num_rows: int
    accuracies: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Run:
    """One execution of a step: what it made, how long it took, how it was set."""

    step: str
    made: str
    duration_s: float
    duration: str
    changed: dict[str, str]
    defaults: dict[str, str]


_MEASURES: tuple[tuple[str, str, Source, str, Callable[[float | None], str]], ...] = (
    ("Exact match", "", "evaluation", "exact_match", formatting.fraction),
    ("Perplexity", "of the reference answers", "evaluation", "perplexity", formatting.plain),
    ("Safety rows", "answered right", "evaluation", "safety_accuracy", formatting.fraction),
    ("Time per response", "median", "benchmark", "latency_ms_p50", formatting.milliseconds),
    ("Time per response", "95th percentile", "benchmark", "latency_ms_p95", formatting.milliseconds),
    ("Time to first token", "median", "benchmark", "time_to_first_token_ms_p50", formatting.milliseconds),
    ("Decoding speed", "tokens per second", "benchmark", "tokens_per_s", formatting.tokens_per_s),
    ("Peak memory", "resident", "benchmark", "peak_rss_bytes", formatting.size),
    ("Runtime's floor", "part of it, with no model", "benchmark", "runtime_floor_bytes", formatting.size),
    ("Size on disk", "", "benchmark", "size_bytes", formatting.size),
)
_WHERE_ASKED = {"safety_accuracy"}
"""Measures that have no line where they were asked of nobody."""


def comparison(subjects: Sequence[Subject]) -> list[Row]:
    """The subjects side by side; the first is the one that the others are compared with."""
    teacher = subjects[0]
    rows = [Row("Accuracy", "with 95 % interval", tuple(_accuracy(subject, teacher) for subject in subjects))]
    for measure, note, source, name, show in _MEASURES:
        reference = teacher.number(source, name)
        values = [subject.number(source, name) for subject in subjects]
        if name in _WHERE_ASKED and not any(value is not None for value in values):
            continue
        ratios = [
            _kept(value, reference) if name == "exact_match" else formatting.ratio(value, reference) for value in values
        ]
        cells = [Cell(show(value), ratio) for value, ratio in zip(values, ratios, strict=True)]
        rows.append(Row(measure, note, (Cell(cells[0].value), *cells[1:])))
    return rows


def interval(subject: Subject) -> str:
    """0.88–0.95, or nothing."""
    low, high = subject.number("evaluation", "accuracy_low"), subject.number("evaluation", "accuracy_high")
    return "" if low is None or high is None else f"{low:.3f}–{high:.3f}"


def strata(subjects: Sequence[Subject]) -> tuple[list[Stratum], int]:
    """Accuracy by stratum, the candidate's worst first, and how many strata are left out."""
    counts = [_counts(subject) for subject in subjects]
    names = list(dict.fromkeys(name for found in counts for name in found))
    if len(names) < 2:
        return [], 0
    names.sort(key=lambda name: _share(counts[-1].get(name)))
    shown = [
        Stratum(
            name=name or "(none)",
            num_rows=max(found[name][1] for found in counts if name in found),
            accuracies=tuple(
                (f"{found[name][0]} of {found[name][1]}", _share(found[name])) if name in found else (NOTHING, 0.0)
                for found in counts
            ),
        )
        for name in names[:MAX_STRATA]
    ]
    return shown, len(names) - len(shown)


def runs(artifacts: Iterable[Artifact]) -> list[Run]:
    """The executions behind the artifacts, oldest first. One that wrote several artifacts at a time counts once."""
    grouped: dict[str, list[Artifact]] = {}
    for artifact in artifacts:
        summary = artifact.summary
        if summary.step != "import":
            grouped.setdefault(json.dumps([summary.step, summary.parents, summary.config]), []).append(artifact)
    found = []
    for made in grouped.values():
        first = made[0].summary
        duration_s = max(artifact.summary.duration_s for artifact in made)
        changed, defaults = _settings(first)
        names = ", ".join(artifact.name.removeprefix(f"{artifact.summary.kind} of ") for artifact in made)
        found.append(Run(first.step, names, duration_s, formatting.seconds(duration_s), changed, defaults))
    return found


def settings(runs: Iterable[Run]) -> list[tuple[str, str, Run]]:
    """Steps with what they were run for, and one of the runs; those with the same settings are taken together."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(json.dumps([run.step, run.changed, run.defaults]), []).append(run)
    return [(same[0].step, ", ".join(run.made for run in same), same[0]) for same in grouped.values()]


def machine(subjects: Sequence[Subject], artifacts: Iterable[Artifact]) -> list[tuple[str, str]]:
    """Versions and hardware, each with what they are of."""
    lines = []
    for subject in subjects:
        runtime, cpu = subject.text("benchmark", "runtime"), subject.text("benchmark", "cpu")
        threads = subject.number("benchmark", "num_threads")
        parts = [runtime or "", f"{threads:.0f} threads" if threads else "", cpu or ""]
        if any(parts):
            lines.append((f"{subject.role}, measured on", ", ".join(part for part in parts if part)))
    for artifact in artifacts:
        facts = artifact.summary.facts
        if "device" in facts:
            speed = facts.get("tokens_per_s")
            parts = [str(facts["device"]), str(facts.get("dtype", ""))]
            parts += [f"{speed:.0f} tokens/s"] if isinstance(speed, int | float) else []
            lines.append((f"{artifact.name}, made by {artifact.summary.step} on", ", ".join(filter(None, parts))))
    versions = sorted({artifact.summary.slmops_version for artifact in artifacts})
    return [*lines, ("slmops", ", ".join(versions))] if versions else lines


def _accuracy(subject: Subject, teacher: Subject) -> Cell:
    accuracy = subject.number("evaluation", "accuracy")
    around = f" ({interval(subject)})" if interval(subject) else ""
    kept = "" if subject is teacher else _kept(accuracy, teacher.number("evaluation", "accuracy"))
    return Cell(formatting.fraction(accuracy) + around, kept)


def _kept(value: float | None, reference: float | None) -> str:
    return f"{formatting.share(value / reference)} of the teacher's" if value is not None and reference else ""


def _counts(subject: Subject) -> dict[str, tuple[int, int]]:
    found = subject.evaluation.facts.get("by_stratum") if subject.evaluation else None
    return {name: (correct, rows) for name, (correct, rows) in found.items()} if isinstance(found, dict) else {}


def _share(counts: tuple[int, int] | None) -> float:
    return counts[0] / counts[1] if counts and counts[1] else 0.0


def _settings(summary: Summary) -> tuple[dict[str, str], dict[str, str]]:
    """The settings that differ from the step's defaults, and the others."""
    defaults = _defaults(summary.step)
    changed: dict[str, str] = {}
    same: dict[str, str] = {}
    for name, value in summary.config.items():
        (same if name in defaults and defaults[name] == value else changed)[name] = _as_text(value)
    return changed, same


def _defaults(step: str) -> dict[str, Any]:
    """Defaults of the step's Config, found by the step's name: the gate knows no other step."""
    try:
        module = import_module(f"slmops.{step}.config")
    except ImportError:
        return {}
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Config) and value.__module__ == module.__name__:
            return {name: info.default for name, info in value.model_fields.items() if not info.is_required()}
    return {}


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
