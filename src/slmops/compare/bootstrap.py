"""How far chance in the choice of the test rows moves what was measured on them, for several models at once.

The method is that of `slmops.paired`; all figures are found on the same resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from slmops.compare.config import CompareConfig
from slmops.compare.subjects import NAMES, Role
from slmops.pages.formatting import NBSP, share
from slmops.paired import MAX_DRAWN, Interval, Kind, figure

if TYPE_CHECKING:
    from numpy.typing import NDArray

Finding = Literal["more", "less", "unclear", "equal", "unknown"]
"""Clear of no difference on either side; not clear; the same on every row; nothing that can be said."""

COMPARED: tuple[tuple[Kind, Role, Role], ...] = (
    ("difference", "distilled", "labels_only"),
    ("difference", "distilled", "untrained"),
    ("difference", "distilled", "teacher"),
    ("retention", "distilled", "teacher"),
    ("retention", "labels_only", "teacher"),
)


@dataclass(frozen=True)
class Comparison:
    """The accuracy of one subject beside another's: their difference, or the share that is kept of it."""

    kind: Kind
    one: Role
    other: Role
    interval: Interval | None
    finding: Finding
    words: str

    @property
    def name(self) -> str:
        """`distilled_minus_teacher`, `distilled_retention`."""
        return f"{self.one}_minus_{self.other}" if self.kind == "difference" else f"{self.one}_retention"


@dataclass(frozen=True)
class Intervals:
    """Accuracy of each subject, and what is compared."""

    accuracy: dict[Role, Interval]
    comparisons: tuple[Comparison, ...]

    def find(self, kind: Kind, one: Role, other: Role) -> Comparison | None:
        return next((c for c in self.comparisons if (c.kind, c.one, c.other) == (kind, one, other)), None)


def intervals(correct: Mapping[Role, NDArray[Any]], config: CompareConfig) -> Intervals:
    """Accuracies and comparisons over the same resamples.

    Args:
        correct: [R] of bool per subject, R ≥ 2; whether its answer to a row is right.
    """
    import numpy as np
    from scipy.stats import bootstrap

    roles = list(correct)
    compared = [(kind, one, other) for kind, one, other in COMPARED if one in roles and other in roles]

    def figures(*samples: NDArray[Any], axis: int) -> NDArray[Any]:
        means = dict(zip(roles, (sample.mean(axis=axis) for sample in samples), strict=True))
        return np.stack([*means.values(), *(figure(kind, means[one], means[other]) for kind, one, other in compared)])

    samples = [correct[role] for role in roles]
    num_rows = len(samples[0])
    values = figures(*samples, axis=-1)
    found = bootstrap(
        samples,
        figures,
        n_resamples=config.num_resamples,
        batch=max(1, MAX_DRAWN // num_rows),
        vectorized=True,
        paired=True,
        confidence_level=config.confidence_level,
        method="percentile",  # BCa needs a resample per row, each as long as the test
        rng=np.random.default_rng(config.seed),
    )
    lows, highs = found.confidence_interval
    all_found = [Interval(float(v), float(low), float(high)) for v, low, high in zip(values, lows, highs, strict=True)]
    accuracy = dict(zip(roles, all_found, strict=False))
    num_without = dict(zip(roles, (found.bootstrap_distribution == 0).sum(axis=-1).tolist(), strict=False))
    comparisons = []
    for (kind, one, other), interval in zip(compared, all_found[len(roles) :], strict=True):
        if kind == "retention" and num_without[other]:
            comparisons.append(
                Comparison(kind, one, other, None, "unknown", _unknown(other, num_without[other], config))
            )
        else:
            same = bool((correct[one] == correct[other]).all())
            finding = _finding(interval, 1.0 if kind == "retention" else 0.0, same)
            words = _words(kind, one, other, interval, finding, config)
            comparisons.append(Comparison(kind, one, other, interval, finding, words))
    return Intervals(accuracy, tuple(comparisons))


def _finding(interval: Interval, neutral: float, same: bool) -> Finding:
    if same:
        return "equal"
    if interval.low > neutral:
        return "more"
    return "less" if interval.high < neutral else "unclear"


def _unknown(other: Role, num_without: int, config: CompareConfig) -> str:
    return (
        f"In {num_without:,} of {config.num_resamples:,} resamples the {NAMES[other]} answers no row right, and a "
        "share of nothing is no number: evaluate more rows, or find out why it is so often wrong."
    )


def _words(kind: Kind, one: Role, other: Role, interval: Interval, finding: Finding, config: CompareConfig) -> str:
    if finding == "equal":
        return f"The {NAMES[one]} is right on the same rows as the {NAMES[other]}: these rows show no difference."
    level = f"{100 * config.confidence_level:g}{NBSP}% interval"
    if kind == "difference":
        said = (
            f"The {NAMES[one]} answers {points(abs(interval.value))} {'more' if interval.value >= 0 else 'fewer'} of "
            f"the rows right than the {NAMES[other]} ({level} {signed(interval.low)} to {signed(interval.high)})"
        )
        return f"{said}; {_clear(finding, 'zero')}."
    kept = f"The {NAMES[one]} keeps {share(interval.value)} of the {NAMES[other]}'s accuracy"
    return f"{kept} ({level} {share(interval.low)} to {share(interval.high)}); {_clear(finding, f'100{NBSP}%')}."


def _clear(finding: Finding, of: str) -> str:
    if finding == "unclear":
        return f"the interval holds {of}, so these rows do not tell the two apart"
    return f"the interval is clear of {of}"


def points(difference: float) -> str:
    """0.0412 → 4.1 points: differences of shares are no shares."""
    return f"{100 * difference:.1f}{NBSP}points"


def signed(difference: float) -> str:
    """-0.0412 → −4.1."""
    shown = f"{100 * abs(difference):.1f}"
    return shown if float(shown) == 0 else f"{'+' if difference > 0 else '−'}{shown}"
