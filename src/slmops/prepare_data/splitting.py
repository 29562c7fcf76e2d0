"""Which row goes into which split: by seed and stratum, or as the rows say, and never one prompt in two splits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from slmops.prepare_data.words import mix

Codes = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
"""A split's code is its place here."""
UNDECIDED = -1

MIN_ROWS_PER_CLASS, MAX_SEEN_ONCE_FRACTION = 2, 0.15
"""Strata are classes if they have at least so many rows on average, and no more than this share of all rows is the only
one of its stratum; else they are texts, such as answers to questions."""


def split_by_seed(
    ids: npt.NDArray[np.uint64],
    strata: npt.NDArray[np.uint64],
    units: npt.NDArray[np.int64],
    shares: Mapping[Split, float],
    seed: int,
) -> Codes:
    """Divide rows by `shares`, which add up to 1, the same way in whatever order they come.

    Rows of one unit stay together. In each stratum each split gets its share rounded up or down, as far as units
    leave it free; which of the two, is chosen so that the whole data set comes out right too. Each split gets at least
    one row if there are as many units as splits.

    Args:
        ids: [num_rows] what tells rows apart, whatever their order.
        strata: [num_rows] hash of the group that a row is counted in.
        units: [num_rows] the number of the row that stands for all that must stay together.
    """
    codes = np.full(len(ids), UNDECIDED, np.int8)
    places = np.array([SPLITS.index(split) for split in shares])
    fractions = np.array(list(shares.values()))
    names, stratum = np.unique(strata, return_inverse=True)
    need = np.bincount(stratum, minlength=len(names))[:, None] * fractions
    sizes = np.bincount(units, minlength=len(ids))[units]

    total = need.sum(axis=0)
    for rows in _large_units(ids, units, sizes, seed):
        chosen = _place_unit(need[stratum[rows]].sum(axis=0), total, fractions, len(rows))
        codes[rows] = places[chosen]
        np.subtract.at(need, (stratum[rows], chosen), 1)
        total[chosen] -= len(rows)
    free = np.flatnonzero(sizes == 1)
    order = np.lexsort((draw(ids[free], seed, "split"), draw(names, seed, "stratum")[stratum[free]]))
    codes[free[order]] = places[_fill(stratum[free[order]], need)]
    _leave_none_empty(codes, ids, units, places, seed)
    return codes


def seen_once(strata: npt.NDArray[np.uint64]) -> Mask:
    """[num_rows] rows that are the only one of their class; none if strata are no classes."""
    _, stratum, counts = np.unique(strata, return_inverse=True, return_counts=True)
    return np.asarray((counts[stratum] == 1) & are_classes(counts))


def are_classes(counts: npt.NDArray[np.integer[Any]]) -> bool:
    """Whether strata of so many rows each are classes."""
    num_rows = counts.sum()
    enough = len(counts) * MIN_ROWS_PER_CLASS <= num_rows
    return bool(enough and (counts == 1).sum() <= MAX_SEEN_ONCE_FRACTION * num_rows)


def leaked_prompts(prompts: npt.NDArray[np.uint64], codes: Codes) -> Mask:
    """Rows of train whose prompt validation or test has, and rows of validation whose prompt test has."""
    test = prompts[codes == SPLITS.index("test")]
    validation = (codes == SPLITS.index("validation")) & np.isin(prompts, test)
    judged = np.r_[test, prompts[(codes == SPLITS.index("validation")) & ~validation]]
    return np.asarray(validation | ((codes == SPLITS.index("train")) & np.isin(prompts, judged)))


def count_contradictions(prompts: npt.NDArray[np.uint64]) -> int:
    """Prompts that occur in more than one row, where all rows are different."""
    return int((np.unique(prompts, return_counts=True)[1] > 1).sum())


def draw(ids: npt.NDArray[np.uint64], seed: int, purpose: str) -> npt.NDArray[np.uint64]:
    """A number for each id by which to sort, that depends on nothing but id, seed and purpose."""
    salt = int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}".encode()).digest()[:8], "little")
    return mix(mix(ids) ^ np.uint64(salt))


def _large_units(ids: Any, units: Any, sizes: Any, seed: int) -> list[Any]:
    """Rows of each unit of several, the largest first."""
    rows = np.flatnonzero(sizes > 1)
    if not len(rows):
        return []
    # A unit is known by its smallest id, which does not depend on the order of the rows.
    smallest = np.full(len(ids), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, units[rows], ids[rows])
    name = smallest[units[rows]]
    rows = rows[np.lexsort((ids[rows], name, draw(name, seed, "unit"), -sizes[rows]))]
    starts = np.flatnonzero(np.r_[True, units[rows][1:] != units[rows][:-1]])
    return np.split(rows, starts[1:])


def _place_unit(need: Any, total: Any, fractions: Any, size: int) -> int:
    """The split that a unit of `size` rows goes to.

    Among the splits that have room for half of it or more, the one that lacks most, for its share, in the strata of
    these rows, then overall; if it is too large for each, the one with the most room.
    """
    fits = np.flatnonzero(total >= size / 2)
    if not len(fits):
        return int(np.argmax(total))
    by_stratum, overall = np.round(need / fractions, 9), total / fractions
    return int(max(fits, key=lambda place: (by_stratum[place], overall[place])))


def _fill(stratum: Any, need: Any) -> Any:
    """For rows sorted by stratum: the split of each, so that each stratum gets what it needs, rounded up or down.

    What a stratum got too little is carried to the next; the splits that are owed most are rounded up.
    """
    chosen = np.empty(len(stratum), np.int8)
    starts = np.flatnonzero(np.r_[True, stratum[1:] != stratum[:-1]][: len(stratum)])
    owed = [0.0] * need.shape[1]
    for start, end in pairwise([*starts.tolist(), len(stratum)]):
        for place, count in enumerate(_round(end - start, need[stratum[start]].tolist(), owed)):
            chosen[start : start + count] = place
            start += count
    return chosen


def _round(count: int, need: list[float], owed: list[float]) -> list[int]:
    """Whole numbers that add up to `count`, each `need` rounded up or down; `owed` is brought up to date."""
    ideal = [max(0.0, value) for value in need]
    if (total := sum(ideal)) != count:
        ideal = [value * count / total if total else count / len(need) for value in ideal]
    # Products such as 0.1 * 30 must count as the whole numbers that they stand for.
    given = [math.floor(value + 1e-9) for value in ideal]
    for place, value in enumerate(need):
        owed[place] += value - given[place]
    fractional = [place for place in range(len(need)) if ideal[place] - given[place] > 1e-9]
    fractional.sort(key=lambda place: -owed[place])
    for place in fractional[: count - sum(given)]:
        given[place] += 1
        owed[place] -= 1
    given[int(max(range(len(need)), key=ideal.__getitem__))] += count - sum(given)
    return given


def _leave_none_empty(codes: Any, ids: Any, units: Any, places: Any, seed: int) -> None:
    """Move a smallest unit to each split that got none: of the largest of those that have more than one."""
    for place in places:
        counts = np.bincount(codes, minlength=len(SPLITS))
        if counts[place]:
            continue
        num_units = np.array([len(np.unique(units[codes == code])) for code in range(len(SPLITS))])
        if num_units.max() < 2:
            continue
        members = np.flatnonzero(codes == np.where(num_units > 1, counts, 0).argmax())
        found, sizes = np.unique(units[members], return_counts=True)
        small = members[np.isin(units[members], found[sizes == sizes.min()])]
        moved = units[small[np.argmin(draw(ids[small], seed, f"fill {SPLITS[place]}"))]]
        codes[units == moved] = place
