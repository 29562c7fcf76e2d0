"""Runs of words that train shares with the rows that judge.

Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C: 13 words in a row, and runs that occur in more
than ten training documents are boilerplate and count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from slmops.prepare_data.splitting import UNDECIDED, Codes, Mask
from slmops.prepare_data.words import Hashes, Indices

MAX_COMMON = 10
"""A run that train has more often is boilerplate, such as an instruction that many prompts repeat."""
RUNS_AT_ONCE = 4_000_000
"""Runs of held-out rows that are held in memory at a time, 8 bytes each."""
_FILTER_BITS = 26

Chunks = Callable[[], Iterator[tuple[Indices, Hashes, Indices]]]
"""Gives (rows, runs, owner): row numbers, and runs with the place in `rows` of the row that each is from."""


def overlapping(chunks: Chunks, codes: Codes, train: int) -> Mask:
    """[num_rows] rows of train that share a run with a row of another split; code -1 is for rows in no split.

    Memory holds RUNS_AT_ONCE runs, however many rows there are; for more held-out rows, train is read again.
    """
    found = np.zeros(len(codes), np.bool_)
    for held_out in _held_out(chunks, codes, train):
        wanted = _Lookup(held_out)
        counts = np.zeros(len(held_out), np.int64)
        for _, places in _hits(chunks, codes, train, wanted):
            counts += np.bincount(places, minlength=len(counts))
        telling = counts <= MAX_COMMON
        for rows, places in _hits(chunks, codes, train, wanted):
            found[rows[telling[places]]] = True
    return found


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
    for rows, runs, owner in chunks():
        judging = (codes[rows] != UNDECIDED) & (codes[rows] != train)
        gathered.append(np.unique(runs[judging[owner]]))
        size += len(gathered[-1])
        if size > RUNS_AT_ONCE:
            yield np.unique(np.concatenate(gathered))
            gathered, size = [], 0
    if size:
        yield np.unique(np.concatenate(gathered))


def _hits(chunks: Chunks, codes: Codes, train: int, wanted: _Lookup) -> Iterator[tuple[Indices, npt.NDArray[np.int64]]]:
    """(row, place of the run in `wanted`) of each run of train that is wanted."""
    for rows, runs, owner in chunks():
        in_train = np.flatnonzero((codes[rows] == train)[owner])
        which, places = wanted.find(runs[in_train])
        yield rows[owner[in_train[which]]], places
