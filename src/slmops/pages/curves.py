"""What a training leaves of its way: figures over optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from slmops.pages import formatting
from slmops.pages.charts import INK, TRAINING, VALIDATION, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
"""Optimizer steps, each with a figure."""


@dataclass(frozen=True)
class Curve:
    """A picture of one training run."""

    title: str
    chart: Markup
    caption: str


def loss_curve(title: str, facts: Mapping[str, Any]) -> Curve | None:
    """Training and validation loss by the facts `loss_curve` and `validation_curve`; None if nothing was trained."""
    training, validation = points(facts, "loss_curve"), points(facts, "validation_curve")
    if not any(step for step, _ in (*training, *validation)):
        return None
    ends = [
        f"{name} loss {formatting.digits3(found[0][1])} → {formatting.digits3(found[-1][1])}"
        for name, found in (("training", training), ("validation", validation))
        if found
    ]
    steps = max(found[-1][0] for found in (training, validation) if found)
    caption = f"{steps:,.0f} steps; {'; '.join(ends)}"
    return Curve(title, _loss_chart(training, validation, f"{title}: {caption}"), caption)


def metric_curve(title: str, facts: Mapping[str, Any]) -> Curve | None:
    """Share of held-out rows answered right, by the fact `metric_curve`; None if that is not there."""
    found = points(facts, "metric_curve")
    if not found:
        return None
    caption = f"held-out rows answered right {formatting.share(found[0][1])} → {formatting.share(found[-1][1])}"
    return Curve(title, _metric_chart(found, f"{title}: {caption}"), caption)


def points(facts: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    """The points of a curve in a sidecar's facts, without those that no number was found for."""
    return [(step, value) for step, value in facts.get(name) or [] if value is not None and math.isfinite(value)]


def _loss_chart(training: Points, validation: Points, label: str) -> Markup:
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


def _metric_chart(found: Points, label: str) -> Markup:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        steps, shares = zip(*found, strict=True)
        axes.plot(steps, shares, color=VALIDATION, linewidth=1.8, marker="o" if len(found) <= 30 else "", ms=3.5)
        axes.set_xlim(left=0)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel("share answered right")
        axes.grid(visible=False, axis="x")

    return svg(draw, 420, 250, label)
