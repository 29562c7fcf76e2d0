"""Charts of the gate's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from slmops.pages.charts import CANDIDATE, INK, MUTED, STUDENT, TEACHER, TRAINING, VALIDATION, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

_ROLE_COLORS = {"teacher": TEACHER, "student": STUDENT, "candidate": CANDIDATE}


def loss_chart(training: Points, validation: Points, label: str) -> Markup:
    """Loss over optimizer steps; `label` describes the picture to those who do not see it."""

    from matplotlib.ticker import LogLocator

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        if training:
            axes.plot(*zip(*training, strict=True), color=TRAINING, linewidth=1.2, label="training")
        if validation:
            marker = "o" if len(validation) <= 30 else ""
            steps, losses_there = zip(*validation, strict=True)
            axes.plot(steps, losses_there, color=VALIDATION, linewidth=1.8, marker=marker, ms=3.5, label="validation")
        losses = [loss for _, loss in (*training, *validation)]
        if min(losses) > 0 and max(losses) / min(losses) > 30:
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
        else:
            axes.set_ylim(bottom=min(0.0, *losses))
        axes.set_xlim(left=0)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("loss")
        axes.grid(visible=False, axis="x")
        axes.legend(frameon=False, loc="upper right", labelcolor=INK, handlelength=1.4)

    return svg(draw, 420, 250, label)


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
        _name_rows(axes, [role for role, *_ in bars])
        axes.set_xlim(0, max(1.0, wanted or 0.0))
        axes.set_xlabel("accuracy, with 95 % interval")

    return svg(draw, 420, 68 + 30 * len(bars), label)


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    for tick in axes.get_yticklabels():
        tick.set_color(INK)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
