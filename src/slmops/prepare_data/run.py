"""From raw rows to chat records in three splits, in two passes of which neither holds the rows in memory."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slmops import __version__
from slmops.artifacts import Draft, Sidecar, writing
from slmops.errors import DataError, DiskFullError, UserError
from slmops.prepare_data.config import NO_TOKENIZER, PrepareDataConfig
from slmops.prepare_data.findings import SetAside
from slmops.prepare_data.intake import (
    BAD_ROWS,
    CHATS,
    MAX_SHOWN_CHARS,
    ROW,
    SET_ASIDE,
    Intake,
    ShownText,
    aside_line,
    take_in,
)
from slmops.prepare_data.intake import ROWS as ROW_NUMBERS
from slmops.prepare_data.report import write_report
from slmops.prepare_data.selection import EXACT, LEAKED_PROMPT, LEAKED_WORDS, NEAR, STAGES, Selection, select
from slmops.prepare_data.sources import Source, open_source
from slmops.prepare_data.splitting import SPLITS, Split, draw
from slmops.prepare_data.spool import Spool
from slmops.prepare_data.summary import Phases, summarise
from slmops.prepare_data.tokens import TokenCounter
from slmops.progress import Progress, log
from slmops.records import ROWS
from slmops.resume import work_dir

STEP = "prepare_data"
MIN_ROWS = 10
MAX_SHOWN_BAD = 5
MAX_EXAMPLES = 30
"""Rows of each stage that the report shows."""
SPOOL_VERSION = "1"


class PreparedData(NamedTuple):
    """Sidecars of the three datasets."""

    train: Sidecar
    validation: Sidecar
    test: Sidecar


def run(
    config: PrepareDataConfig,
    *,
    train: Path,
    validation: Path,
    test: Path,
    report: Path,
) -> PreparedData:
    """Read `config.source_uri`, set aside what is bad, doubled or leaked, split, and write three chat datasets.

    A run that was killed goes on behind the last ten thousand rows or so that it had finished.

    Raises:
        ConfigError: a template or setting names a column that is not there.
        DataError: too many bad rows, too few usable ones, or more than `max_rows`.
        StoreError, TransientError: the source cannot be reached.
    """
    train.parent.mkdir(parents=True, exist_ok=True)
    phases = Phases()
    with _unfinished(config, train) as directory:
        with phases.timed("recognise"):
            tokens = None if config.tokenizer_uri == NO_TOKENIZER else TokenCounter(config.tokenizer_uri, directory)
            source = open_source(config.source_uri, directory)
        key = {"spool": SPOOL_VERSION, "slmops": __version__, "source": source.digest}
        key["tokenizer"] = tokens.digest if tokens else "none"
        with Spool(directory / "spool", key) as spool:
            with phases.timed("read"):
                intake = take_in(config, source, spool, tokens)
            _check_bad(config, spool, intake)
            with phases.timed("select"):
                selection = select(config, spool, intake.chunk_rows)
            _check_kept(config, intake, selection)
            return _write(config, source, spool, intake, selection, tokens, phases, (train, validation, test), report)


@contextmanager
def _unfinished(config: PrepareDataConfig, output: Path) -> Iterator[Path]:
    """The directory for unfinished work; gone when the step is done, or fails in a way that it would fail in again."""
    directory = work_dir(STEP, config, [], output)
    try:
        yield directory
    except DiskFullError:
        raise
    except UserError:
        shutil.rmtree(directory)
        raise
    shutil.rmtree(directory)


def _check_bad(config: PrepareDataConfig, spool: Spool, intake: Intake) -> None:
    if not intake.num_read:
        raise DataError(f"{config.source_uri} has no rows; check that it is the right file")
    if intake.num_bad / intake.num_read > config.max_bad_fraction:
        bad_rows = [json.loads(line) for line, _ in zip(spool.lines(BAD_ROWS), range(MAX_SHOWN_BAD), strict=False)]
        shown = "\n  ".join(f"{bad['where']}: {bad['reason']}" for bad in bad_rows)
        more = f"\n  and {intake.num_bad - MAX_SHOWN_BAD:,} more" if intake.num_bad > MAX_SHOWN_BAD else ""
        raise DataError(
            f"{intake.num_bad:,} of {intake.num_read:,} rows are bad ({intake.num_bad / intake.num_read:.2%}), more "
            f"than max_bad_fraction={config.max_bad_fraction:g} allows; correct them, or raise max_bad_fraction to "
            f"leave them out:\n  {shown}{more}"
        )
    if intake.num_bad:
        log.info("%s of %s rows are bad; see %s in train", f"{intake.num_bad:,}", f"{intake.num_read:,}", BAD_ROWS)
    for stage, count in intake.stages.items():
        log.info("%s rows set aside: %s; see %s in train", f"{count:,}", stage, SET_ASIDE)
    if intake.num_pii_rows:
        found = ", ".join(f"{count:,} {kind}" for kind, count in sorted(intake.pii_values.items()))
        log.info("personal data in %s rows (%s): %s", f"{intake.num_pii_rows:,}", found, config.pii)


def _check_kept(config: PrepareDataConfig, intake: Intake, selection: Selection) -> None:
    """Enough rows, and some in each split; says what was left out."""
    num_usable = len(selection.codes) - selection.count(EXACT) - selection.count(NEAR)
    if num_usable < MIN_ROWS:
        aside = sum(intake.stages.values()) + selection.count(NEAR)
        raise DataError(
            f"{config.source_uri} has {num_usable} usable rows ({intake.num_read:,} rows, {intake.num_bad:,} bad, "
            f"{selection.count(EXACT):,} duplicates"
            + (f", {aside:,} set aside" if aside else "")
            + f"); at least {MIN_ROWS} are needed"
        )
    counts = [int((selection.codes == split).sum()) for split in range(len(SPLITS))]
    num_leaked = selection.count(LEAKED_PROMPT) + selection.count(LEAKED_WORDS)
    if empty := [split for split, count in zip(SPLITS, counts, strict=True) if not count and config.split_by != "none"]:
        raise DataError(
            f"{' and '.join(empty)} would have no rows ({num_leaked:,} left out: another split has their "
            f"prompt, or words of it); give more rows or other fractions, or see leakage and group_by"
        )
    _log_selection(config, selection)
    log.info("%s", ", ".join(f"{count:,} rows to {split}" for split, count in zip(SPLITS, counts, strict=True)))


def _log_selection(config: PrepareDataConfig, selection: Selection) -> None:
    if count := selection.count(EXACT):
        log.info("%s exact duplicates left out", f"{count:,}")
    if count := selection.num_near_duplicates:
        did = "left out" if config.near_duplicates == "remove" else "kept, each in the split of the rows it resembles"
        log.info("%s near duplicates in %s clusters: %s", f"{count:,}", f"{selection.num_clusters:,}", did)
    if count := selection.num_contradictions:
        log.info("%s prompts occur with more than one completion; they are kept", f"{count:,}")
    if count := selection.num_seen_once:
        log.info("%s rows are the only ones of their class; they are in train, so no figure will speak of them", count)
    if count := selection.count(LEAKED_PROMPT):
        log.info("%s rows left out of train or validation: their prompts are in a split that judges", f"{count:,}")
    if count := selection.num_overlapping:
        did = "left out" if config.leakage == "remove" else "kept, because leakage=report"
        log.info(
            "%s rows of train share %d words in a row with validation or test: %s",
            f"{count:,}",
            config.leakage_ngram,
            did,
        )


def _facts(source: Source, intake: Intake, selection: Selection, tokens: TokenCounter | None) -> dict[str, Any]:
    facts = {
        "num_bad": intake.num_bad,
        "num_set_aside": sum(intake.stages.values()) + int((selection.stages > 0).sum()),
        "num_duplicates": selection.count(EXACT),
        "num_near_duplicates": selection.num_near_duplicates,
        "num_near_duplicate_clusters": selection.num_clusters,
        "num_near_duplicates_removed": selection.count(NEAR),
        "num_leaked": selection.count(LEAKED_PROMPT) + selection.count(LEAKED_WORDS),
        "num_overlapping": selection.num_overlapping,
        "num_contradictions": selection.num_contradictions,
        "num_seen_once": selection.num_seen_once,
        "num_pii_rows": intake.num_pii_rows,
        "num_cleaned": intake.num_cleaned,
        "layout": intake.layout,
        "format": source.format,
        "source_sha256": source.digest,
    }
    facts |= {f"num_pii_{kind}": count for kind, count in sorted(intake.pii_values.items())}
    return facts | ({"tokenizer_digest": tokens.digest} if tokens else {})


def _write(
    config: PrepareDataConfig,
    source: Source,
    spool: Spool,
    intake: Intake,
    selection: Selection,
    tokens: TokenCounter | None,
    phases: Phases,
    outputs: tuple[Path, Path, Path],
    report: Path,
) -> PreparedData:
    facts = _facts(source, intake, selection, tokens)
    # Left in reverse order: whoever finds train finds the other two.
    with (
        writing(outputs[0], kind="chat_dataset", step=STEP, config=config) as train_draft,
        writing(outputs[1], kind="chat_dataset", step=STEP, config=config) as validation_draft,
        writing(outputs[2], kind="chat_dataset", step=STEP, config=config) as test_draft,
    ):
        drafts: dict[Split, Draft] = {"train": train_draft, "validation": validation_draft, "test": test_draft}
        with phases.timed("write"):
            order = _write_splits(config, spool, selection, drafts)
            set_aside = _write_set_aside(config, source, spool, selection, train_draft.path)
        summary = summarise(config, source, spool, intake, selection, tokens, order, set_aside, phases)
        for split, draft in drafts.items():
            draft.facts |= {"num_rows": len(order[split]), "split": split, **facts, **summary.facts[split]}
        write_report(report, summary.findings)
    return PreparedData(train_draft.sidecar, validation_draft.sidecar, test_draft.sidecar)


def _write_splits(
    config: PrepareDataConfig, spool: Spool, selection: Selection, drafts: dict[Split, Draft]
) -> dict[Split, np.ndarray]:
    """Copy the finished lines in seeded order; returns the rows of each split in that order."""
    ids = spool.column(ROW_NUMBERS, ROW, "id")
    ends = spool.column(ROW_NUMBERS, ROW, "end")
    starts = np.r_[np.int64(0), ends[:-1]]
    order: dict[Split, np.ndarray] = {}
    with Progress("writing", int((selection.codes >= 0).sum())) as progress:
        for code, split in enumerate(SPLITS):
            rows = np.flatnonzero(selection.codes == code)
            rows = rows[np.lexsort((ids[rows], draw(ids[rows], config.seed, "order")))]
            with open(drafts[split].path / ROWS, "wb", buffering=1 << 20) as file:
                for line in spool.pieces(CHATS, starts[rows], ends[rows]):
                    file.write(line)
                    progress.advance()
            order[split] = rows
    return order


def _write_set_aside(
    config: PrepareDataConfig, source: Source, spool: Spool, selection: Selection, directory: Path
) -> list[SetAside]:
    """Write what was taken out, each with where, stage and reason; no file for nothing. Returns some of each stage."""
    examples = _Examples()
    if spool.size(BAD_ROWS):
        shutil.copyfile(spool.directory / BAD_ROWS, directory / BAD_ROWS)
        for _, line in zip(range(MAX_EXAMPLES), spool.lines(BAD_ROWS), strict=False):
            bad = json.loads(line)
            examples.add(bad["where"], "bad", bad["reason"], bad["row"])
    rows = np.flatnonzero(selection.stages)
    if not len(rows) and not spool.size(SET_ASIDE):
        return examples.found
    shown = ShownText(config)
    ends = spool.column(ROW_NUMBERS, ROW, "end")
    parts, lines = (spool.column(ROW_NUMBERS, ROW, name) for name in ("part", "line"))
    starts = np.r_[np.int64(0), ends[:-1]]

    def where(row: int) -> str:
        return f"{source.parts[parts[row]].name}:{lines[row]}"

    with open(directory / SET_ASIDE, "wb", buffering=1 << 20) as file:
        for line in spool.lines(SET_ASIDE):
            file.write(line)
            examples.add(**json.loads(line))
        for row, chat in zip(rows.tolist(), spool.pieces(CHATS, starts[rows], ends[rows]), strict=True):
            number = int(selection.stages[row])
            stage = reason = STAGES[number - 1]
            if number == NEAR:
                reason = f"near duplicate of {where(selection.clusters[row])}"
            text = "\n".join(message["content"] for message in json.loads(chat)["messages"])
            # Only where personal data stay in, it has to be kept out of here.
            text = shown.of(text) if config.pii == "off" else text[:MAX_SHOWN_CHARS]
            file.write(aside_line(where(row), stage, reason, text))
            examples.add(where(row), stage, reason, text)
    return examples.found


class _Examples:
    """The first rows that each stage took out."""

    def __init__(self) -> None:
        self.found: list[SetAside] = []
        self._counts: Counter[str] = Counter()

    def add(self, where: str, stage: str, reason: str, text: str) -> None:
        if self._counts[stage] < MAX_EXAMPLES:
            self._counts[stage] += 1
            self.found.append(SetAside(where, stage, reason, text))
