"""How far chance in the choice of the test rows moves what two models were measured to differ by.

The paired bootstrap (Efron and Tibshirani 1993, doi:10.1201/9780429246593; for models on one test Koehn 2004,
https://aclanthology.org/W04-3250): the rows are drawn anew with replacement, the same rows for all models, so that what
makes a row hard for all of them does not count as chance between them. Intervals are the percentiles of what is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind = Literal["difference", "retention"]

MAX_DRAWN = 4_000_000
"""Rows drawn at a time, over several resamples: 32 MB of indices, whatever the size of the test."""


@dataclass(frozen=True)
class Interval:
    """A figure and where the resamples put it."""

    value: float
    low: float
    high: float


def figure(kind: Kind, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """The difference of two accuracies, or their ratio; 0 in place of a share of nothing, which no one gets to see."""
    import numpy as np

    if kind == "difference":
        return np.asarray(one - other)
    return np.asarray(np.divide(one, other, out=np.zeros_like(one), where=other > 0))


def interval(
    kind: Kind,
    one: NDArray[Any],
    other: NDArray[Any],
    *,
    num_resamples: int = 2000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The accuracy of `one` less that of `other`, or its share of it, over resamples of the rows that both answered.

    Args:
        one: [R] of bool, R ≥ 2; whether the answer to a row is right.
        other: [R] of bool, of the same rows in the same order; for a share at least one of them right.
    """
    import numpy as np
    from scipy.stats import bootstrap

    def found(first: NDArray[Any], second: NDArray[Any], axis: int) -> NDArray[Any]:
        return figure(kind, first.mean(axis=axis), second.mean(axis=axis))

    value = float(found(one, other, axis=-1))
    if (one == other).all():
        return Interval(value, value, value)
    result = bootstrap(
        [one, other],
        found,
        n_resamples=num_resamples,
        batch=max(1, MAX_DRAWN // len(one)),
        vectorized=True,
        paired=True,
        confidence_level=confidence_level,
        method="percentile",  # BCa needs a resample per row, each as long as the test
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(value, float(low), float(high))
