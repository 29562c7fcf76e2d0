"""What the report shows and what later steps may ask: figures of the rows that stay, and some of those that do not."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slmops.prepare_data.chats import ChatMaker, Recognised
from slmops.prepare_data.config import PrepareDataConfig
from slmops.prepare_data.findings import (
    Class,
    Cluster,
    Findings,
    Lengths,
    LengthTally,
    PersonalData,
    Sample,
    SetAside,
    Stage,
    class_balance,
    funnel,
)
from slmops.prepare_data.findings import Source as Reading
from slmops.prepare_data.intake import CHATS, ROW, ROWS, Intake, ShownText
from slmops.prepare_data.selection import STAGES, Selection
from slmops.prepare_data.sources import Source
from slmops.prepare_data.splitting import SPLITS, Split, are_classes
from slmops.prepare_data.spool import Spool
from slmops.prepare_data.tokens import TokenCounter

MAX_CLASSES = 30
MAX_CLUSTERS = 10
NUM_SAMPLES = 5
MAX_TEXT_CHARS = 300


class Phases:
    """How long each phase took."""

    def __init__(self) -> None:
        self.durations_s: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time the body."""
        started = time.monotonic()
        yield
        self.durations_s[name] = round(time.monotonic() - started, 2)


@dataclass
class Summary:
    """For people, and for later steps."""

    findings: Findings
    facts: dict[Split, dict[str, Any]] = field(default_factory=dict)
    """By split: figures of its rows."""


def summarise(
    config: PrepareDataConfig,
    source: Source,
    spool: Spool,
    intake: Intake,
    selection: Selection,
    tokens: TokenCounter | None,
    order: dict[Split, np.ndarray],
    set_aside: Sequence[SetAside],
    phases: Phases,
) -> Summary:
    """Figures of the rows in each split, taken from the numbers on disk a column at a time."""
    chats = _Chats(config, spool)
    classes, class_facts = _classes(config, spool, order, chats)
    lengths, length_facts = _lengths(config, spool, order, tokens)
    shown: Split = "test" if config.split_by == "none" else "train"
    findings = Findings(
        name=config.source_uri.rstrip("/").rsplit("/", 1)[-1],
        source=Reading(
            uri=config.source_uri,
            version=config.source_version,
            sha256=source.digest,
            size_bytes=source.size_bytes,
            recognised=f"{source.format}, layout {intake.layout}",
            why=f"{source.why}; {intake.why}",
            roles=ChatMaker(config, Recognised(intake.layout, intake.why), intake.columns).roles(),  # type: ignore[arg-type]
        ),
        num_read=intake.num_read,
        funnel=_funnel(intake, selection),
        splits={split: len(rows) for split, rows in order.items()},
        set_aside_reasons=_reasons(intake, selection),
        set_aside=tuple(set_aside),
        pii_policy=config.pii,
        pii=tuple(PersonalData(kind, n, intake.pii_rows[kind]) for kind, n in sorted(intake.pii_values.items())),
        num_pii_rows=intake.num_pii_rows,
        num_cleaned=intake.num_cleaned,
        num_clusters=selection.num_clusters,
        clusters=_clusters(selection, chats),
        num_contradictions=selection.num_contradictions,
        class_column=config.stratify_by if classes else "",
        num_classes=class_facts.get("num_classes", 0),
        classes=classes,
        lengths=lengths,
        tokenizer=f"{tokens.name} {tokens.digest[:12]}" if tokens else "",
        samples=tuple(chats.sample(int(row), shown) for row in order[shown][:NUM_SAMPLES]),
        settings=_settings(config),
        durations_s=phases.durations_s,
    )
    facts: dict[Split, dict[str, Any]] = {split: length_facts[split] | class_facts for split in order}
    return Summary(findings, facts)


class _Chats:
    """Reads single rows that are to be shown."""

    def __init__(self, config: PrepareDataConfig, spool: Spool) -> None:
        self._spool = spool
        self._ends = spool.column(ROWS, ROW, "end")
        self._shown = ShownText(config)

    def record(self, row: int) -> dict[str, Any]:
        start = self._ends[row - 1] if row else 0
        (line,) = self._spool.pieces(CHATS, np.array([start]), self._ends[row : row + 1])
        record: dict[str, Any] = json.loads(line)
        return record

    def text(self, row: int) -> str:
        contents = (message["content"] for message in self.record(row)["messages"] if message["role"] != "system")
        return self._shown.of("\n".join(contents), MAX_TEXT_CHARS)

    def sample(self, row: int, split: Split) -> Sample:
        record = self.record(row)
        turns = tuple((message["role"], self._shown.of(message["content"])) for message in record["messages"])
        return Sample(record["id"], split, turns)

    def stratum(self, row: int) -> str:
        return self._shown.of(self.record(row)["stratum"])


def _funnel(intake: Intake, selection: Selection) -> tuple[Stage, ...]:
    taken = [("bad", intake.num_bad, "no chat can be made of them; in bad_rows.jsonl of train")]
    taken += [(stage, count, "in set_aside.jsonl of train") for stage, count in intake.stages.items()]
    taken += [(stage, selection.count(number), NOTES[stage]) for number, stage in enumerate(STAGES, 1)]
    return funnel(intake.num_read, taken)


NOTES = dict(
    zip(
        STAGES,
        (
            "one of each is kept",
            "one of each cluster is kept",
            "a split that judges has their prompt",
            "validation or test has words in a row of their prompt",
        ),
        strict=True,
    )
)


def _reasons(intake: Intake, selection: Selection) -> dict[str, int]:
    own = {stage: selection.count(number) for number, stage in enumerate(STAGES, 1)}
    return dict((intake.bad_reasons + intake.reasons + Counter(own)).most_common())


def _clusters(selection: Selection, chats: _Chats) -> tuple[Cluster, ...]:
    """The largest clusters of near duplicates."""
    others = np.flatnonzero(selection.clusters != np.arange(len(selection.clusters)))
    roots, first, counts = np.unique(selection.clusters[others], return_index=True, return_counts=True)
    largest = np.lexsort((roots, -counts))[:MAX_CLUSTERS]
    return tuple(
        Cluster(int(counts[i]) + 1, chats.text(int(roots[i])), chats.text(int(others[first[i]]))) for i in largest
    )


def _classes(
    config: PrepareDataConfig, spool: Spool, order: dict[Split, np.ndarray], chats: _Chats
) -> tuple[tuple[Class, ...], dict[str, Any]]:
    """The largest classes and those that a split lacks; nothing if strata are no classes."""
    if "none" in (config.stratify_by, config.split_by):
        return (), {}
    strata = spool.column(ROWS, ROW, "stratum")
    rows = np.concatenate([order[split] for split in SPLITS])
    names, first, number = np.unique(strata[rows], return_index=True, return_inverse=True)
    totals = np.bincount(number)
    if len(names) < 2 or not are_classes(totals):
        return (), {}
    split_of = np.repeat(np.arange(len(SPLITS)), [len(order[split]) for split in SPLITS])
    counts = np.bincount(number * len(SPLITS) + split_of, minlength=len(names) * len(SPLITS)).reshape(-1, len(SPLITS))
    largest = np.lexsort((names, -totals))[:MAX_CLASSES]
    lacking = np.flatnonzero((counts[:, [0, 2]] == 0).any(axis=1))[:MAX_CLASSES]
    shown = {int(one): chats.stratum(int(rows[first[one]])) for one in np.r_[largest, lacking]}
    by_split: dict[str, dict[str, int]] = {
        split: {name: int(counts[one, place]) for one, name in shown.items()} for place, split in enumerate(SPLITS)
    }
    facts = {
        "num_classes": len(names),
        "largest_class_fraction": round(float(totals.max() / len(rows)), 6),
        "smallest_class_fraction": round(float(totals.min() / len(rows)), 6),
    }
    return class_balance(by_split, MAX_CLASSES), facts


def _lengths(
    config: PrepareDataConfig, spool: Spool, order: dict[Split, np.ndarray], tokens: TokenCounter | None
) -> tuple[tuple[Lengths, ...], dict[Split, dict[str, Any]]]:
    wanted = [("prompts", "characters", "prompt_chars"), ("completions", "characters", "completion_chars")]
    if tokens:
        wanted.append(("whole rows", "tokens", "num_tokens"))
    found, facts = [], dict[Split, dict[str, Any]]({split: {} for split in order})
    for what, unit, column in wanted:
        values, tally = spool.column(ROWS, ROW, column), LengthTally()
        for split, rows in order.items():
            tally.add(values[rows])
            if column == "num_tokens" and len(rows):
                half, most, longest = np.quantile(values[rows], (0.5, 0.99, 1.0), method="higher").tolist()
                total = int(values[rows].sum(dtype=np.int64))
                facts[split] = {"num_tokens": total, "tokens_p50": half, "tokens_p99": most, "tokens_max": longest}
        limited = column == "num_tokens" and "max_tokens" in config.model_fields_set
        found.append(Lengths(what, unit, tally.histogram(), config.max_tokens if limited else None))
    return tuple(found), facts


def _settings(config: PrepareDataConfig) -> dict[str, str]:
    """Settings that are not at their defaults."""
    defaults = {name: field.default for name, field in PrepareDataConfig.model_fields.items()}
    return {
        name: str(value)
        for name, value in config.parameters("source_uri", "source_version").items()
        if value != defaults[name]
    }
