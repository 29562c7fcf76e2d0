"""The comparison's report: one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from slmops.compare import charts
from slmops.compare.bootstrap import Comparison, Finding, Intervals, points, signed
from slmops.compare.charts import Line
from slmops.compare.config import CompareConfig
from slmops.compare.disagreements import Disagreements, Stratum
from slmops.compare.rows import OUTCOMES, Rows
from slmops.compare.subjects import NAMES, Role, Subject
from slmops.pages import formatting, page
from slmops.pages.charts import INK
from slmops.pages.curves import Curve, loss_curve, metric_curve
from slmops.pages.formatting import NBSP, NOTHING, share
from slmops.paired import Interval

MAX_STRATA = 20

Tone = Literal["pass", "fail", "not_run"]
"""The class of the style sheet: distillation helped, harmed, or neither can be said."""

_TONES: dict[Finding, Tone] = {
    "more": "pass",
    "less": "fail",
    "unclear": "not_run",
    "equal": "not_run",
    "unknown": "not_run",
}
FINDINGS: dict[Finding, str] = {
    "more": "clearly more",
    "less": "clearly less",
    "unclear": "not clear",
    "equal": "no difference",
    "unknown": "unknown",
}


@dataclass(frozen=True)
class Findings:
    """All that the page shows."""

    subjects: dict[Role, Subject]
    rows: Rows
    intervals: Intervals
    disagreements: Disagreements
    strata: list[Stratum]


@dataclass(frozen=True)
class Headline:
    """What distillation did, in a sentence, and what that rests on."""

    tone: Tone
    title: str
    reason: str


@dataclass(frozen=True)
class Measure:
    """One line of the table of subjects, with a cell for each."""

    name: str
    note: str
    cells: tuple[str, ...]


def render(config: CompareConfig, found: Findings) -> str:
    """The page; what was not measured is shown as a dash."""
    subjects = list(found.subjects.values())
    level = f"{100 * config.confidence_level:g}{NBSP}%"
    return page.render(
        "slmops.compare",
        headline=headline(found.intervals),
        found=found,
        subjects=subjects,
        measured_at=max(subject.evaluation.created_at for subject in subjects),
        comparisons=found.intervals.comparisons,
        tones=_TONES,
        findings=FINDINGS,
        outcomes=OUTCOMES,
        names=NAMES,
        measures=_measures(found, level),
        differences=_forest(found.intervals, "difference", level),
        retention=_forest(found.intervals, "retention", level),
        curves=_curves(subjects),
        reliability=charts.reliability(subjects),
        strata=found.strata[:MAX_STRATA],
        num_more_strata=max(0, len(found.strata) - MAX_STRATA),
        chance=_chance(found.disagreements),
        config=config,
        level=level,
        share=share,
        signed=signed,
        points=points,
    )


def headline(found: Intervals) -> Headline:
    """What distillation added to what labels alone teach; if that was not measured, to the untrained student."""
    added = found.find("difference", "distilled", "labels_only")
    over: Role = "labels_only"
    if added is None:
        added, over = found.find("difference", "distilled", "untrained"), "untrained"
    kept = found.find("retention", "distilled", "teacher")
    if added is None or added.interval is None:
        title = "What distillation added was not measured: there is no student without it to compare with."
        return Headline("not_run", title, kept.words if kept else "")
    return Headline(
        _TONES[added.finding], _title(added, added.interval, over), f"{added.words} {kept.words if kept else ''}"
    )


def _title(added: Comparison, interval: Interval, over: Role) -> str:
    what, than = (
        ("Distillation", "labels alone teach") if over == "labels_only" else ("Training", "the untrained student knows")
    )
    by = points(abs(interval.value))
    if added.finding == "more":
        return f"{what} adds {by} of accuracy to what {than}."
    if added.finding == "less":
        return f"{what} takes {by} of accuracy away from what {than}."
    if added.finding == "equal":
        return f"{what} changes nothing of what {than}, on these rows."
    return f"{what} makes no clear difference to what {than}: {signed(interval.value)}{NBSP}points of accuracy."


def _measures(found: Findings, level: str) -> list[Measure]:
    subjects = list(found.subjects.values())
    shown: tuple[tuple[str, str, str, Callable[[float | None], str]], ...] = (
        ("Macro F1", "of answers as classes", "macro_f1", formatting.fraction),
        ("Exact match", "", "exact_match", formatting.fraction),
        ("ROUGE-L", "words in common, in order", "rouge_l", formatting.fraction),
        ("BLEU", "0 to 100", "bleu", _tenths),
        ("chrF", "0 to 100", "chrf", _tenths),
        ("Perplexity", "of the reference answers", "perplexity", formatting.plain),
        ("Calibration error", "expected; 0 is best", "expected_calibration_error", formatting.fraction),
        ("Brier score", "0 is best", "brier_score", formatting.fraction),
        ("Size on disk", "", "size_bytes", formatting.size),
    )
    accuracies = (found.intervals.accuracy[subject.role] for subject in subjects)
    return [
        Measure("Rows", "", tuple(formatting.count(subject.number("num_rows")) for subject in subjects)),
        Measure("Accuracy", f"with {level} interval", tuple(map(_accuracy, accuracies))),
        *(Measure(name, note, tuple(show(s.number(fact)) for s in subjects)) for name, note, fact, show in shown),
        Measure("Parameters", "", tuple(formatting.many(subject.num_parameters) for subject in subjects)),
    ]


def _accuracy(found: Interval) -> str:
    return f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})"


def _tenths(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def _forest(found: Intervals, kind: Literal["difference", "retention"], level: str) -> Markup | None:
    """The comparisons of a kind that have an interval, as one chart."""
    lines = []
    for compared in found.comparisons:
        if compared.kind == kind and compared.interval:
            shown = signed(compared.interval.value) if kind == "difference" else share(compared.interval.value)
            color = INK if kind == "difference" else charts.COLORS[compared.one]
            lines.append(Line(_line_name(compared), compared.interval, color, shown))
    if not lines:
        return None
    said = "; ".join(compared.words for compared in found.comparisons if compared.kind == kind)
    if kind == "difference":
        return charts.forest(lines, 0.0, f"points of accuracy, with {level} interval", said)
    return charts.forest(lines, 1.0, f"per cent of the teacher's accuracy, with {level} interval", said)


def _line_name(compared: Comparison) -> str:
    short = {"labels_only": "labels alone", "untrained": "untrained", "teacher": "teacher", "distilled": "distilled"}
    return f"distilled − {short[compared.other]}" if compared.kind == "difference" else short[compared.one]


def _curves(subjects: Sequence[Subject]) -> list[Curve]:
    """Of all that slmops trained, the distilled student first; none twice."""
    drawn: dict[str, list[Curve | None]] = {}
    for subject in reversed(subjects):
        model = subject.model
        if model and model.digest not in drawn:
            title = f"{subject.name.capitalize()}, {model.step}"
            drawn[model.digest] = [loss_curve(title, model.facts), metric_curve(f"{title}: answers", model.facts)]
    return [curve for curves in drawn.values() for curve in curves if curve]


def _chance(found: Disagreements) -> str:
    """The exact test of McNemar in words."""
    if found.p_value is None:
        return "Teacher and distilled student are right on the same rows."
    teacher, distilled = found.counts["only_teacher"], found.counts["only_distilled"]
    p = "less than 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"
    return (
        f"On {teacher + distilled:,} rows only one of the two is right: the teacher on {teacher:,}, the distilled "
        f"student on {distilled:,}. Were both equally good, a split as uneven as this would come up with a "
        f"probability of {p} (exact test of McNemar)."
    )
