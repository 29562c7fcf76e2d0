"""Charts of the report as inline SVG. Colours are variables of the page's style sheet, so they follow its theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

# Matplotlib takes no CSS variables: each stands for one until the SVG is written.
_COLORS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--training)",
    "#050505": "var(--validation)",
    "#060606": "var(--teacher)",
    "#070707": "var(--student)",
    "#080808": "var(--candidate)",
}
INK, MUTED, RULE, TRAINING, VALIDATION, TEACHER, STUDENT, CANDIDATE = _COLORS
_ROLE_COLORS = {"teacher": TEACHER, "student": STUDENT, "candidate": CANDIDATE}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "slmops",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same metrics, so the same bytes, on every machine
    "font.size": 11,
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


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

    return _svg(draw, 420, 250, label)


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

    return _svg(draw, 420, 68 + 30 * len(bars), label)


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    for tick in axes.get_yticklabels():
        tick.set_color(INK)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _svg(draw: Callable[[Figure], None], width: int, height: int, label: str) -> Markup:
    """Draw a figure of `width` by `height` pixels, and make its SVG fit for a page: no clashing ids, no fixed size."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure)
        out = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=metadata)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<!--.*?-->|<style.*?</style>|; font-family: 'DejaVu Sans'|(?<=<g) id=\"[^\"]*\"", "", svg, flags=re.DOTALL
    )
    for color, variable in _COLORS.items():
        svg = svg.replace(color, variable)
    head = f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" width="{width}"'
    return Markup(head + svg[svg.index(">") :])  # noqa: S704 - made here, and matplotlib escapes what it draws
