"""Charts of the gate's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from slmops.pages.charts import CANDIDATE, INK, MUTED, STUDENT, TEACHER, name_rows, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROLE_COLORS = {"teacher": TEACHER, "student": STUDENT, "candidate": CANDIDATE}


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
