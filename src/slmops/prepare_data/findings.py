"""What prepare_data found out about a data set: all that its report shows, small whatever the number of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)

_EXACT_BITS = 6
"""Lengths below 2**7 have a bin each; above, every octave has 2**6, so a bin is at most 1.6 % wide."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows come from and how they were understood."""

    uri: str
    version: str
    sha256: str
    size_bytes: int
    recognised: str
    """File format and layout in words: `JSONL, chat messages`."""
    why: str
    """What they were recognised by."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """What became of each column: {"text": "prompt", "category": "completion"}."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One line of the funnel: what a stage took out, and what was left behind it."""

    name: str
    """`bad`, `exact duplicates`, `leaked by prompt`."""
    num_out: int
    num_left: int
    note: str = ""
    """What became of the rows, and by which setting."""


@dataclass(frozen=True, slots=True)
class PersonalData:
    """What was found of one kind."""

    kind: str
    num_values: int
    num_rows: int
    """Rows with at least one."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Rows that nearly say the same."""

    num_rows: int
    kept: str
    """The row that stays, shortened by whoever builds this."""
    example: str
    """One that went."""


@dataclass(frozen=True, slots=True)
class Class:
    """One class, or stratum, by split."""

    name: str
    num_train: int
    num_validation: int
    num_test: int

    @property
    def num_rows(self) -> int:
        return self.num_train + self.num_validation + self.num_test


@dataclass(frozen=True, slots=True)
class Histogram:
    """How a length is spread: `counts[i]` values are at least `edges[i]` and below `edges[i + 1]`."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    num_values: int
    total: int
    smallest: int
    largest: int
    quantiles: Mapping[float, int]
    """Length by share of the rows that are not longer; exact below 128, above it within 1.6 %."""

    @property
    def mean(self) -> float:
        return self.total / self.num_values if self.num_values else 0.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long something is."""

    what: str
    """`prompts`, `completions`, `whole rows`."""
    unit: str
    """`characters` or `tokens`."""
    histogram: Histogram
    limit: int | None = None
    """A length that matters, such as the longest row that training takes."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A row as it is written."""

    id: str
    split: str
    messages: tuple[tuple[str, str], ...]
    """(role, content) of each turn."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """A row that is in no split. Reason and text are redacted before they come here."""

    where: str
    """Source and line."""
    stage: str
    """Name of the stage of the funnel that took it."""
    reason: str
    text: str
    """Its beginning."""


@dataclass(frozen=True, slots=True)
class Findings:
    """All of it."""

    name: str
    """What the data set is called."""
    source: Source
    num_read: int
    funnel: tuple[Stage, ...]
    """In the order of the work; `num_read` goes in, the last `num_left` comes out into the splits."""
    splits: Mapping[str, int]
    """Rows of train, validation and test."""
    set_aside_reasons: Mapping[str, int] = field(default_factory=dict)
    """Rows by reason, all of them; `set_aside` shows some."""
    set_aside: tuple[SetAside, ...] = ()
    pii_policy: str = "off"
    """`redact`, `drop` or `off`."""
    pii: tuple[PersonalData, ...] = ()
    num_pii_rows: int = 0
    """Rows with personal data of any kind."""
    num_cleaned: int = 0
    """Rows that lost control characters and stay."""
    num_clusters: int = 0
    """Of near duplicates."""
    clusters: tuple[Cluster, ...] = ()
    """The largest ones."""
    num_contradictions: int = 0
    """Prompts that occur with more than one completion."""
    class_column: str = ""
    """What the classes are: a column's name, `completion`; empty if there are none."""
    num_classes: int = 0
    classes: tuple[Class, ...] = ()
    """The largest ones, and those that some split lacks."""
    lengths: tuple[Lengths, ...] = ()
    tokenizer: str = ""
    """Name and digest of the tokenizer that counted; empty if none did."""
    samples: tuple[Sample, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings that are not at their defaults, ready to print."""
    durations_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase, in order."""


class LengthTally:
    """Counts lengths in a fixed number of bins, so that nothing grows with the rows."""

    def __init__(self) -> None:
        self._bins: dict[int, int] = {}
        self._total = 0
        self._smallest = self._largest = -1

    def add(self, lengths: Sequence[int] | np.ndarray) -> None:
        """Count `lengths`, each 0 or more."""
        import numpy as np

        values = np.asarray(lengths, np.int64)
        if not values.size:
            return
        self._total += int(values.sum())
        smallest = int(values.min())
        self._smallest = smallest if self._smallest < 0 else min(self._smallest, smallest)
        self._largest = max(self._largest, int(values.max()))
        for number, count in zip(*np.unique(_bin(values), return_counts=True), strict=True):
            self._bins[int(number)] = self._bins.get(int(number), 0) + int(count)

    def histogram(self, max_bars: int = 40) -> Histogram:
        """What was counted, in at most `max_bars` bars whose edges are round numbers."""
        numbers = sorted(self._bins)
        counts = [self._bins[number] for number in numbers]
        starts = [_start(number) for number in numbers]
        num_values = sum(counts)
        smallest, largest = max(self._smallest, 0), max(self._largest, 0)

        def quantile(share: float) -> int:
            # A bin begins below what is in it.
            return min(max(_quantile(starts, counts, share), smallest), largest)

        edges = _edges(smallest, largest, quantile(0.99), max_bars)
        bars = [0] * (len(edges) - 1)
        at = 0
        for start, count in zip(starts, counts, strict=True):
            while at < len(bars) - 1 and start >= edges[at + 1]:
                at += 1
            bars[at] += count
        return Histogram(
            edges=tuple(edges),
            counts=tuple(bars),
            num_values=num_values,
            total=self._total,
            smallest=smallest,
            largest=largest,
            quantiles={share: quantile(share) for share in QUANTILES},
        )


def _bin(values: np.ndarray) -> np.ndarray:
    """Number of the bin of each value: floating point with six bits behind the first."""
    import numpy as np

    shift = np.maximum(np.frexp(values.astype(np.float64))[1] - 1 - _EXACT_BITS, 0).astype(np.int64)
    numbers: np.ndarray = (shift << _EXACT_BITS) + (values >> shift)
    return numbers


def _start(number: int) -> int:
    """The smallest value in a bin."""
    shift = max((number >> _EXACT_BITS) - 1, 0)
    return (number - (shift << _EXACT_BITS)) << shift


def _quantile(starts: Sequence[int], counts: Sequence[int], share: float) -> int:
    wanted, seen = share * sum(counts), 0
    for start, count in zip(starts, counts, strict=True):
        seen += count
        if seen >= wanted:
            return start
    return 0


def _edges(smallest: int, largest: int, nearly_largest: int, max_bars: int) -> list[int]:
    """Edges of equal bars with a round width up to where 99 % of the values are; the last bar takes the rest."""
    width = _round_width(max(nearly_largest - smallest, 1) / (max_bars - 2))
    first = smallest // width * width
    edges = list(range(first, nearly_largest + width + 1, width))
    if largest >= edges[-1]:
        edges.append(largest + 1)
    return edges


def _round_width(least: float) -> int:
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= least:
                return step * power
        power *= 10


def class_balance(counts: Mapping[str, Mapping[str, int]], max_classes: int) -> tuple[Class, ...]:
    """From {split: {class: rows}} the largest classes, and those that a split lacks, largest first."""
    names = set[str]().union(*counts.values())

    def of(split: str, name: str) -> int:
        return counts.get(split, {}).get(name, 0)

    classes = [Class(name, of("train", name), of("validation", name), of("test", name)) for name in names]
    classes.sort(key=lambda one: (-one.num_rows, one.name))
    lacking = [one for one in classes[max_classes:] if not one.num_train or not one.num_test]
    return (*classes[:max_classes], *lacking[:max_classes])


def funnel(num_read: int, out: Iterable[tuple[str, int, str]]) -> tuple[Stage, ...]:
    """Stages from (name, rows taken out, note), with what is left behind each."""
    left, stages = num_read, []
    for name, num_out, note in out:
        left -= num_out
        stages.append(Stage(name, num_out, left, note))
    return tuple(stages)
