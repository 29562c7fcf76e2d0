"""Charts of the gate's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from slmops.pages.charts import CANDIDATE, INK, MUTED, STUDENT, TEACHER, UNTRAINED, name_rows, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROUND_SIZES = [base * 10**power for power in range(-3, 6) for base in (1, 2, 5)]
_LINE_COLORS = (CANDIDATE, STUDENT, UNTRAINED, MUTED)
_LINE_STYLES = ("solid", "dashed", "dotted")
_MAX_PART_NAMES = 16
_ROLE_COLORS = {"teacher": TEACHER, "student": STUDENT, "champion": MUTED, "candidate": CANDIDATE}


def accuracy_chart(bars: Sequence[tuple[str, float, float, float]], wanted: float | None, label: str) -> Markup:
    """One bar per (role, accuracy, low, high) with its 95 % interval, and a line at the accuracy that is `wanted`."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, (role, accuracy, low, high) in enumerate(bars):
            axes.barh(row, accuracy, height=0.44, color=_ROLE_COLORS[role])
            axes.errorbar(
                accuracy,
                row,
                xerr=[[accuracy - low], [high - accuracy]],
                color=INK,
                elinewidth=1.4,
                capsize=4,
                capthick=1.4,
            )
        if wanted is not None:
            axes.axvline(wanted, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"wanted {wanted:.3f}",
                (wanted, 1.02),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                color=MUTED,
            )
        name_rows(axes, [role for role, *_ in bars])
        axes.set_xlim(0, max(1.0, wanted or 0.0))
        axes.set_xlabel("accuracy, with 95 % interval")

    return svg(draw, 420, 68 + 30 * len(bars), label)


@dataclass(frozen=True)
class Point:
    """One model in the chart of size and quality."""

    name: str
    size_bytes: float
    accuracy: float
    low: float
    high: float
    passed: bool | None
    """Whether it passes anywhere; None for what is not judged."""


def quality_chart(points: Sequence[Point]) -> Markup:
    """Size on disk (logarithmic) against accuracy with its 95 % interval; what passes somewhere is filled."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for point in points:
            color = STUDENT if point.passed is None else CANDIDATE
            axes.errorbar(
                point.size_bytes / 1e6,
                point.accuracy,
                yerr=[[point.accuracy - point.low], [point.high - point.accuracy]],
                color=color,
                marker="o",
                markersize=7,
                markerfacecolor=color if point.passed is not False else "none",
                elinewidth=1.2,
                capsize=3,
            )
            axes.annotate(
                point.name,
                (point.size_bytes / 1e6, point.accuracy),
                xytext=(7, 5),
                textcoords="offset points",
                color=MUTED,
                fontsize=10,
            )
        axes.set_xscale("log")
        axes.set_xlabel("size on disk, MB")
        axes.set_ylabel("accuracy, with 95 % interval")
        sizes = [point.size_bytes / 1e6 for point in points]
        ticks = [size for size in _ROUND_SIZES if min(sizes) / 2 <= size <= max(sizes) * 2]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.margins(x=0.18)

    said = "; ".join(f"{p.name} {p.size_bytes / 1e6:.1f} MB, {p.accuracy:.3f}" for p in points)
    return svg(draw, 640, 340, f"Size against accuracy: {said}")


def drift_chart(lines: Mapping[str, Sequence[tuple[str, float]]]) -> Markup:
    """Drift up to each part of each variant: (part, KL) in the order in which the parts work."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, (name, parts) in enumerate(lines.items()):
            style = _LINE_STYLES[number // len(_LINE_COLORS) % len(_LINE_STYLES)]
            color = _LINE_COLORS[number % len(_LINE_COLORS)]
            axes.plot(
                [kl for _, kl in parts], color=color, linestyle=style, linewidth=1.8, marker="o", ms=3, label=name
            )
        names = [name.removeprefix("layer ") for name, _ in max(lines.values(), key=len)]
        every = -(-len(names) // _MAX_PART_NAMES)
        ticks = [0, *range(1, len(names) - 1, every), len(names) - 1]
        axes.set_xticks(ticks, [names[tick] for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel("KL up to there, nats a token")
        axes.grid(visible=False, axis="x")
        axes.legend(frameon=False, loc="upper left", labelcolor=INK, handlelength=1.8)

    said = "; ".join(f"{name} {parts[-1][1]:.4f} in all" for name, parts in lines.items())
    return svg(draw, 640, 300, f"Drift up to each layer: {said}")
