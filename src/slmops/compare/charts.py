"""Charts of the comparison's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from slmops.compare.subjects import NAMES, Role, Subject
from slmops.pages.charts import CANDIDATE, INK, MUTED, STUDENT, TEACHER, UNTRAINED, name_rows, svg
from slmops.paired import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS: dict[Role, str] = {
    "teacher": TEACHER,
    "untrained": UNTRAINED,
    "labels_only": STUDENT,
    "distilled": CANDIDATE,
}


@dataclass(frozen=True)
class Line:
    """A figure with its interval on a line of its own."""

    name: str
    interval: Interval
    color: str
    text: str
    """The figure as it is written beside the line."""


def forest(lines: Sequence[Line], neutral: float, axis: str, label: str) -> Markup:
    """A point and its interval per line in hundredths, and a dashed line at `neutral`, where there is no difference."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.axvline(neutral, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for row, line in enumerate(lines):
            found = line.interval
            axes.errorbar(
                found.value,
                row,
                xerr=[[max(0.0, found.value - found.low)], [max(0.0, found.high - found.value)]],
                color=line.color,
                marker="o",
                ms=6,
                elinewidth=2,
                capsize=4,
                capthick=2,
            )
            axes.annotate(
                line.text,
                (1.02, row),
                xycoords=("axes fraction", "data"),
                va="center",
                color=INK,
                annotation_clip=False,
            )
        name_rows(axes, [line.name for line in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.margins(x=0.08)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(axis)

    return svg(draw, 420, 62 + 34 * len(lines), label)


def reliability(subjects: Sequence[Subject]) -> Markup | None:
    """How often an answer is right by how sure the model is of it; None if no confidence was kept.

    A point is a bin of ten, the larger the more rows; on the diagonal a model is as right as it is sure.
    """
    found = {subject.role: bins for subject in subjects if (bins := _bins(subject))}
    if not found:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for role, bins in found.items():
            num_rows = sum(one["num_rows"] for one in bins)
            sure, right = [one["confidence"] for one in bins], [one["accuracy"] for one in bins]
            sizes = [18 + 140 * one["num_rows"] / num_rows for one in bins]
            axes.plot(sure, right, color=COLORS[role], linewidth=1.2, label=NAMES[role], marker="o", ms=4)
            axes.scatter(sure, right, s=sizes, color=COLORS[role], alpha=0.55, linewidths=0)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.04, 1.04)
        axes.set_xlabel("probability that the model gives to its answer")
        axes.set_ylabel("share of answers that are right")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), labelcolor=INK, handlelength=1.4)

    said = "; ".join(
        f"{NAMES[role]} " + ", ".join(f"{one['accuracy']:.2f} right at {one['confidence']:.2f}" for one in bins)
        for role, bins in found.items()
    )
    return svg(draw, 420, 360, f"Share of right answers by confidence: {said}")


def _bins(subject: Subject) -> list[dict[str, Any]]:
    return list(subject.evaluation.facts.get("reliability") or [])
