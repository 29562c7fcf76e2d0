"""Runs of words that train shares with the rows that judge.

Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C: 13 words in a row, and runs that occur in more
than ten training documents are boilerplate and count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from slmops.prepare_data.splitting import UNDECIDED, Codes, Mask
from slmops.prepare_data.words import Hashes, Indices, Ragged, offsets

MAX_COMMON, MAX_COMMON_FRACTION = 10, 0.05
"""A run that train has more often is boilerplate, such as an instruction that many prompts repeat; in small data sets
so is one that more than this share of the rows has, if it has more than two."""
RUNS_AT_ONCE = 4_000_000
"""Runs of held-out rows that are held in memory at a time, 8 bytes each."""
_FILTER_BITS = 26

Chunks = Callable[[], Iterator[tuple[Indices, Ragged]]]
"""Gives (row numbers, the runs of each row in order) of some thousand rows after the other."""


def overlapping(chunks: Chunks, codes: Codes, train: int, run_words: int) -> Mask:
    """[num_rows] rows of train that share a run with a row of another split; code -1 is for rows in no split.

    A run counts only if none of its words are part of boilerplate: else its last words, and whatever comes next, would
    be a run that few rows share. Memory holds RUNS_AT_ONCE runs, however many rows there are; for more held-out rows,
    train is read again.
    """
    found = np.zeros(len(codes), np.bool_)
    max_common = max(2, min(MAX_COMMON, int(MAX_COMMON_FRACTION * (codes == train).sum())))
    for held_out in _held_out(chunks, codes, train):
        wanted = _Lookup(held_out)
        counts = np.zeros(len(held_out), np.int64)
        for rows, runs in chunks():
            which, places = wanted.find(runs.values)
            counts += np.bincount(places[(codes[rows] == train)[runs.owners[which]]], minlength=len(counts))
        for rows, runs in chunks():
            which, places = wanted.find(runs.values)
            common = counts[places] > max_common
            telling = which[~common & ~_near(which[common], which, runs, run_words)]
            found[rows[runs.owners[telling]]] = True
    leaked: Mask = found & (codes == train)
    return leaked


def _near(common: Indices, which: Indices, runs: Ragged, run_words: int) -> Mask:
    """Which runs share a word with one of the runs `common`, in the same row."""
    before = offsets(np.bincount(common, minlength=len(runs.values)))
    owners = runs.owners[which]
    first = np.maximum(which - run_words + 1, runs.starts[owners])
    last = np.minimum(which + run_words, runs.starts[owners + 1])
    return np.asarray(before[last] > before[first])


class _Lookup:
    """Finds the places of hashes in a sorted array; most that are not in it are told by a bit table."""

    def __init__(self, values: Hashes) -> None:
        self._values = values
        self._shift = np.uint64(64 - _FILTER_BITS)
        self._present = np.zeros(1 << _FILTER_BITS, np.bool_)
        self._present[values >> self._shift] = True

    def find(self, hashes: Hashes) -> tuple[Indices, Indices]:
        """(which of `hashes` are there, their places)."""
        maybe = np.flatnonzero(self._present[hashes >> self._shift])
        places = np.minimum(np.searchsorted(self._values, hashes[maybe]), len(self._values) - 1)
        there = self._values[places] == hashes[maybe]
        return maybe[there], places[there]


def _held_out(chunks: Chunks, codes: Codes, train: int) -> Iterator[Hashes]:
    """Runs of the rows that judge, sorted, each once, so many at a time."""
    gathered: list[Hashes] = []
    size = 0
    for rows, runs in chunks():
        judging = (codes[rows] != UNDECIDED) & (codes[rows] != train)
        gathered.append(np.unique(runs.pick(judging).values))
        size += len(gathered[-1])
        if size > RUNS_AT_ONCE:
            yield np.unique(np.concatenate(gathered))
            gathered, size = [], 0
    if size:
        yield np.unique(np.concatenate(gathered))
