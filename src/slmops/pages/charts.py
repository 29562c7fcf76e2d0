"""Charts as inline SVG. Colours are variables of the page's style sheet, so they follow its theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    "#090909": "var(--train)",
    "#0a0a0a": "var(--held-out)",
    "#0b0b0b": "var(--untrained)",
}
INK, MUTED, RULE, TRAINING, VALIDATION, TEACHER, STUDENT, CANDIDATE, TRAIN, HELD_OUT, UNTRAINED = _COLORS

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


def svg(draw: Callable[[Figure], None], width: int, height: int, label: str) -> Markup:
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


def name_rows(axes: Axes, names: list[str]) -> None:
    """Name what is drawn at 0, 1, 2, … of the vertical axis, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    for tick in axes.get_yticklabels():
        tick.set_color(INK)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
