"""Second pass: which rows stay and in which split, decided by numbers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from slmops.errors import DataError
from slmops.prepare_data.config import PrepareDataConfig
from slmops.prepare_data.duplicates import NUM_HASHES, Clusters, cluster
from slmops.prepare_data.intake import BANDS, ROW, ROWS, RUNS, SIGNATURES
from slmops.prepare_data.leakage import overlapping
from slmops.prepare_data.splitting import (
    SPLITS,
    UNDECIDED,
    Codes,
    Split,
    count_contradictions,
    leaked_prompts,
    seen_once,
    split_by_seed,
)
from slmops.prepare_data.spool import Spool
from slmops.prepare_data.words import Hashes, Indices, Ragged, offsets
from slmops.progress import log

TRAIN, VALIDATION, TEST = range(3)

STAGES = ("exact duplicates", "near duplicates", "leaked by prompt", "leaked by words")
"""Stages that take rows out here; a row's stage is its place here, counted from 1."""
EXACT, NEAR, LEAKED_PROMPT, LEAKED_WORDS = range(1, 5)

MAX_TIED_FRACTION = 0.5
"""Near duplicates that hold more of the rows than this are one template; to keep them together would leave no test."""


@dataclass
class Selection:
    """What becomes of each row."""

    codes: Codes
    """[num_rows] place in SPLITS, -1 for a row that is in none."""
    stages: npt.NDArray[np.int8]
    """[num_rows] which stage took the row out; 0 for none."""
    clusters: Indices
    """[num_rows] the row that stands for the near duplicates of each."""
    num_contradictions: int = 0
    num_seen_once: int = 0
    num_overlapping: int = 0
    """Rows of train that share a run of words with validation or test."""
    num_near_duplicates: int = 0
    num_clusters: int = 0

    def count(self, stage: int) -> int:
        """Rows that a stage took out."""
        return int((self.stages == stage).sum())

    def take_out(self, rows: npt.NDArray[np.bool_], stage: int) -> None:
        """Set rows aside."""
        self.codes[rows] = UNDECIDED
        self.stages[rows] = stage


def select(config: PrepareDataConfig, spool: Spool, chunk_rows: Sequence[int]) -> Selection:
    """Find duplicates, split, find leaks.

    Raises:
        DataError: the split column marks no row for train or test.
    """
    ids = spool.column(ROWS, ROW, "id")
    marked = spool.column(ROWS, ROW, "split")
    selection = Selection(np.full(len(ids), UNDECIDED, np.int8), np.zeros(len(ids), np.int8), np.arange(len(ids)))
    _drop_exact_duplicates(spool, selection, ids, marked)
    if config.near_duplicates != "off" and len(ids):
        _find_near_duplicates(config, spool, selection, ids, marked, chunk_rows)
    kept = selection.stages == 0
    prompts = spool.column(ROWS, ROW, "prompt")
    different = np.unique(ids[kept], return_index=True)[1]
    selection.num_contradictions = count_contradictions(prompts[kept][different])
    _split(config, spool, selection, ids, marked)
    selection.take_out(leaked_prompts(prompts, selection.codes), LEAKED_PROMPT)
    if config.leakage != "off":
        _find_shared_runs(config, spool, selection, chunk_rows)
    return selection


def _drop_exact_duplicates(spool: Spool, selection: Selection, ids: Hashes, marked: Codes) -> None:
    """Keep one of the rows with the same messages and the same mark."""
    # The same one whatever the order: rows may differ in stratum, group or task.
    order = np.lexsort((spool.column(ROWS, ROW, "record"), marked, ids))
    again = (ids[order][1:] == ids[order][:-1]) & (marked[order][1:] == marked[order][:-1])
    selection.stages[order[1:][again]] = EXACT


def _find_near_duplicates(
    config: PrepareDataConfig, spool: Spool, selection: Selection, ids: Hashes, marked: Codes, chunk_rows: Sequence[int]
) -> None:
    # What judges comes first, and stays.
    order = np.lexsort((ids, -marked))
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(len(ids))
    rows = np.flatnonzero((selection.stages == 0) & spool.column(ROWS, ROW, "has_words"))
    found = cluster(
        bands_of(spool, chunk_rows),
        rows,
        rank,
        lambda numbers: spool.records(SIGNATURES, np.uint16, (NUM_HASHES,), numbers),
        config.near_duplicate_threshold,
    )
    selection.clusters = found.roots()
    others = selection.clusters != np.arange(len(ids))
    selection.num_near_duplicates = int(others.sum())
    selection.num_clusters = len(np.unique(selection.clusters[others]))
    if config.near_duplicates == "remove":
        selection.take_out(others & (marked != TEST), NEAR)


def bands_of(spool: Spool, chunk_rows: Sequence[int]) -> Iterator[Hashes]:
    """The hashes of one band after the other, of all rows."""
    num_rows = sum(chunk_rows)
    num_bands = spool.size(BANDS) // (8 * num_rows)
    starts = [0, *accumulate(count * num_bands for count in chunk_rows)]
    for band in range(num_bands):
        yield np.concatenate(
            [
                spool.array(BANDS, np.uint64, start + band * count, count)
                for start, count in zip(starts, chunk_rows, strict=False)
            ]
        )


def _split(config: PrepareDataConfig, spool: Spool, selection: Selection, ids: Hashes, marked: Codes) -> None:
    kept = np.flatnonzero(selection.stages == 0)
    if config.split_by == "none":
        selection.codes[kept] = TEST
        return
    strata = spool.column(ROWS, ROW, "stratum")
    units = _units(config, spool, selection, kept)
    fractions: dict[Split, float] = {"validation": config.validation_fraction, "test": config.test_fraction}
    if config.split_by == "seed":
        once = seen_once(strata[kept]) if config.stratify_by != "none" else np.zeros(len(kept), np.bool_)
        alone = np.isin(units, units[once])
        selection.num_seen_once = int(once.sum())
        selection.codes[kept[alone]] = TRAIN
        rows = kept[~alone]
        shares = fractions | {"train": 1 - sum(fractions.values())}
    else:
        selection.codes[kept] = marked[kept]
        counts = np.bincount(marked[kept], minlength=len(SPLITS))
        if missing := [SPLITS[split] for split in (TRAIN, TEST) if not counts[split]]:
            raise DataError(
                f"column {config.split_column!r} of {config.source_uri} names no row {' or '.join(missing)}; "
                f"mark some rows so, or use split_by=seed"
            )
        if counts[VALIDATION]:
            return
        log.info(
            "no row is marked validation: taking validation_fraction=%g of the train rows", fractions["validation"]
        )
        rows = kept[marked[kept] == TRAIN]
        shares = {"validation": fractions["validation"], "train": 1 - fractions["validation"]}
        units = units[marked[kept] == TRAIN]
        alone = np.zeros(len(rows), np.bool_)
    units = units[~alone]
    local = np.unique(units, return_inverse=True)[1]
    first = np.empty(len(rows), np.int64)
    first[local[::-1]] = np.arange(len(rows))[::-1]
    selection.codes[rows] = split_by_seed(ids[rows], strata[rows], first[local], shares, config.seed)


def _units(config: PrepareDataConfig, spool: Spool, selection: Selection, kept: Indices) -> Indices:
    """What each kept row stays with: its near duplicates, and its group."""
    num_rows = len(selection.codes)
    units = Clusters(np.arange(num_rows))
    roots, counts = np.unique(selection.clusters[kept], return_counts=True)
    if len(roots) and counts.max() > MAX_TIED_FRACTION * len(kept):
        log.warning(
            "%s of %s rows are near duplicates of one another through others, which looks like one template: they are "
            "split all the same; raise near_duplicate_threshold, or group_by a column",
            f"{counts.max():,}",
            f"{len(kept):,}",
        )
    tied = roots[counts <= MAX_TIED_FRACTION * len(kept)]
    rows = kept[np.isin(selection.clusters[kept], tied)]
    units.join(rows, selection.clusters[rows])
    if config.group_by != "none":
        groups = spool.column(ROWS, ROW, "group")
        rows = kept[groups[kept] != 0]
        rows = rows[np.argsort(groups[rows], kind="stable")]
        same = groups[rows][1:] == groups[rows][:-1]
        units.join(rows[:-1][same], rows[1:][same])
    return units.roots()[kept]


def _find_shared_runs(config: PrepareDataConfig, spool: Spool, selection: Selection, chunk_rows: Sequence[int]) -> None:
    num_runs = spool.column(ROWS, ROW, "num_runs").astype(np.int64)

    def chunks() -> Iterator[tuple[Indices, Ragged]]:
        first_row = first_run = 0
        for count in chunk_rows:
            starts = offsets(num_runs[first_row : first_row + count])
            runs = Ragged(spool.array(RUNS, np.uint64, first_run, int(starts[-1])), starts)
            yield np.arange(first_row, first_row + count), runs
            first_row += count
            first_run += len(runs.values)

    shared = overlapping(chunks, selection.codes, TRAIN, config.leakage_ngram)
    selection.num_overlapping = int(shared.sum())
    if config.leakage == "remove":
        selection.take_out(shared, LEAKED_WORDS)
