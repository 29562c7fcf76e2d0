"""From raw rows to chat records in three splits."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from slmops import storage
from slmops.artifacts import Draft, Sidecar, file_digest, writing
from slmops.errors import DataError
from slmops.prepare_data.chats import BadRow, ChatMaker, as_dicts, digest_of_messages
from slmops.prepare_data.config import PrepareDataConfig
from slmops.prepare_data.findings import Findings, Lengths, LengthTally, Sample, SetAside, class_balance, funnel
from slmops.prepare_data.findings import Source as Reading
from slmops.prepare_data.readers import Row, reader_of
from slmops.prepare_data.report import write_report
from slmops.prepare_data.splitting import (
    SPLITS,
    Chat,
    Split,
    count_contradictions,
    drop_leaks,
    shuffled,
    split_by_seed,
)
from slmops.progress import log
from slmops.records import ROWS, write_jsonl

BAD_ROWS = "bad_rows.jsonl"
"""Name of the file with the rows that were set aside, in the train artifact's directory."""

MIN_ROWS = 10
MAX_SHOWN_BAD = 5
MAX_BAD_ROW_CHARS = 2000
MAX_STRATUM_CHARS = 80


class PreparedData(NamedTuple):
    """Sidecars of the three datasets."""

    train: Sidecar
    validation: Sidecar
    test: Sidecar


@dataclass
class Source:
    """What was read."""

    uri: str
    digest: str
    layout: str = ""
    num_rows: int = 0
    num_duplicates: int = 0
    bad_rows: list[dict[str, str]] = field(default_factory=list)
    chats: dict[str, list[Chat]] = field(default_factory=dict)
    """Usable rows by the split that they name; all under "" if the seed decides."""


def run(config: PrepareDataConfig, *, train: Path, validation: Path, test: Path, report: Path) -> PreparedData:
    """Read `config.source_uri`, set bad rows and duplicates aside, split, and write three chat datasets and a report.

    Raises:
        ConfigError: a template or setting names a column that is not there.
        DataError: too many bad rows, too few usable ones, or more than `max_rows`.
    """
    read = reader_of(config.source_uri)
    train.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prepare_data-", dir=train.parent) as directory:
        path = storage.fetch(config.source_uri, Path(directory))
        source = _read(config, path, read)
    _check(config, source)
    parts, num_leaked = _split(config, source)
    facts = {
        "num_bad": len(source.bad_rows),
        "num_duplicates": source.num_duplicates,
        "num_leaked": num_leaked,
        "num_contradictions": _count_contradictions(source),
        "layout": source.layout,
        "source_sha256": source.digest,
    }
    # Left in reverse order: whoever finds train finds the other two.
    with (
        writing(train, kind="chat_dataset", step="prepare_data", config=config) as train_draft,
        writing(validation, kind="chat_dataset", step="prepare_data", config=config) as validation_draft,
        writing(test, kind="chat_dataset", step="prepare_data", config=config) as test_draft,
    ):
        drafts: dict[Split, Draft] = {"train": train_draft, "validation": validation_draft, "test": test_draft}
        for split, draft in drafts.items():
            num_rows = write_jsonl(draft.path / ROWS, map(_record, parts[split]))
            draft.facts |= {"num_rows": num_rows, "split": split, **facts}
        if source.bad_rows:
            write_jsonl(train_draft.path / BAD_ROWS, source.bad_rows)
        _report(config, source, parts, facts, report)
    return PreparedData(train_draft.sidecar, validation_draft.sidecar, test_draft.sidecar)


def _read(config: PrepareDataConfig, path: Path, read: Callable[[Path], Iterator[Row]]) -> Source:
    if not path.is_file():
        raise DataError(f"{config.source_uri} is no file; give one .jsonl, .csv or .parquet file")
    source = Source(config.source_uri, digest=file_digest(path))
    maker: ChatMaker | None = None
    seen: set[tuple[str, str]] = set()
    for row in read(path):
        source.num_rows += 1
        if source.num_rows > config.max_rows:
            raise DataError(
                f"{config.source_uri} has more than max_rows={config.max_rows:,} rows; raise it, or shorten the file"
            )
        if row.problem:
            _set_aside(source, row, row.problem)
            continue
        maker = maker or ChatMaker(config, row.columns)
        try:
            split, chat = maker.split(row.columns), _make_chat(maker, row.columns)
        except BadRow as reason:
            _set_aside(source, row, str(reason))
            continue
        if (split, chat.id) in seen:
            source.num_duplicates += 1
            continue
        seen.add((split, chat.id))
        source.chats.setdefault(split, []).append(chat)
    source.layout = maker.layout if maker else ""
    return source


def _make_chat(maker: ChatMaker, columns: dict[str, Any]) -> Chat:
    messages = maker.messages(columns)
    return Chat(
        id=digest_of_messages(messages),
        prompt_id=digest_of_messages(messages[:-1]),
        messages=messages,
        stratum=maker.stratum(columns, messages),
    )


def _set_aside(source: Source, row: Row, reason: str) -> None:
    # A row may hold what JSON or UTF-8 cannot; here it only has to be recognisable.
    text = json.dumps(row.columns, ensure_ascii=True, default=str)[:MAX_BAD_ROW_CHARS]
    safe_reason = reason.encode("utf-8", "backslashreplace").decode()
    source.bad_rows.append({"where": f"{source.uri}:{row.line}", "reason": safe_reason, "row": text})


def _check(config: PrepareDataConfig, source: Source) -> None:
    """Enough rows, and not too many bad ones."""
    if not source.num_rows:
        raise DataError(f"{source.uri} has no rows; check that it is the right file")
    num_bad = len(source.bad_rows)
    if num_bad / source.num_rows > config.max_bad_fraction:
        shown = "\n  ".join(f"{bad['where']}: {bad['reason']}" for bad in source.bad_rows[:MAX_SHOWN_BAD])
        more = f"\n  and {num_bad - MAX_SHOWN_BAD:,} more" if num_bad > MAX_SHOWN_BAD else ""
        raise DataError(
            f"{num_bad:,} of {source.num_rows:,} rows are bad ({num_bad / source.num_rows:.2%}), more than "
            f"max_bad_fraction={config.max_bad_fraction:g} allows; correct them, or raise max_bad_fraction to leave "
            f"them out:\n  {shown}{more}"
        )
    num_usable = sum(map(len, source.chats.values()))
    if num_usable < MIN_ROWS:
        raise DataError(
            f"{source.uri} has {num_usable} usable rows ({source.num_rows:,} rows, {num_bad:,} bad, "
            f"{source.num_duplicates:,} duplicates); at least {MIN_ROWS} are needed"
        )
    if num_bad:
        log.info("%s of %s rows set aside as bad; see %s in train", f"{num_bad:,}", f"{source.num_rows:,}", BAD_ROWS)
    if source.num_duplicates:
        log.info("%s exact duplicates left out", f"{source.num_duplicates:,}")


def _split(config: PrepareDataConfig, source: Source) -> tuple[dict[Split, list[Chat]], int]:
    if config.split_by == "seed":
        held_out = {"validation": config.validation_fraction, "test": config.test_fraction}
        parts = split_by_seed(source.chats[""], {**held_out, "train": 1 - sum(held_out.values())}, config.seed)  # type: ignore[dict-item]
    else:
        parts = _split_by_column(config, source)
    parts, num_leaked = drop_leaks(parts)
    if num_leaked:
        log.info("%s rows left out of train or validation: their prompts are in a split that judges", f"{num_leaked:,}")
    empty = [split for split in SPLITS if not parts[split]]
    if empty:
        raise DataError(
            f"{' and '.join(empty)} would have no rows ({num_leaked:,} left out: another split has their "
            f"prompt); give more rows or other fractions"
        )
    log.info("%s", ", ".join(f"{len(parts[split]):,} rows to {split}" for split in SPLITS))
    return {split: shuffled(parts[split], config.seed) for split in SPLITS}, num_leaked


def _split_by_column(config: PrepareDataConfig, source: Source) -> dict[Split, list[Chat]]:
    missing = [split for split in ("train", "test") if split not in source.chats]
    if missing:
        raise DataError(
            f"column {config.split_column!r} of {source.uri} names no row {' or '.join(missing)}; "
            f"mark some rows so, or use split_by=seed"
        )
    parts: dict[Split, list[Chat]] = {split: source.chats.get(split, []) for split in SPLITS}
    if not parts["validation"]:
        fraction = config.validation_fraction
        log.info("no row is marked validation: taking validation_fraction=%g of the train rows", fraction)
        parts |= split_by_seed(parts["train"], {"validation": fraction, "train": 1 - fraction}, config.seed)
    return parts


def _count_contradictions(source: Source) -> int:
    found = count_contradictions(chat for chats in source.chats.values() for chat in chats)
    if found:
        log.info("%s prompts occur with more than one completion; they are kept", f"{found:,}")
    return found


def _record(chat: Chat) -> dict[str, Any]:
    stratum = chat.stratum
    if len(stratum) > MAX_STRATUM_CHARS:
        stratum = stratum[: MAX_STRATUM_CHARS - 1] + "…"
    return {"id": chat.id, "messages": as_dicts(chat.messages), "stratum": stratum}


def _report(
    config: PrepareDataConfig, source: Source, parts: dict[Split, list[Chat]], facts: dict[str, Any], path: Path
) -> None:
    rows = [chat for split in SPLITS for chat in parts[split]]
    prompts, completions = LengthTally(), LengthTally()
    prompts.add([sum(len(content) for _, content in chat.messages[:-1]) for chat in rows])
    completions.add([len(chat.messages[-1][1]) for chat in rows])
    classes: dict[str, Counter[str]] = {split: Counter(chat.stratum for chat in parts[split]) for split in SPLITS}
    findings = Findings(
        name=config.source_uri.rsplit("/", 1)[-1],
        source=Reading(config.source_uri, config.source_version, source.digest, 0, source.layout, "its first row"),
        num_read=source.num_rows,
        funnel=funnel(
            source.num_rows,
            [
                ("bad", facts["num_bad"], "set aside"),
                ("exact duplicates", source.num_duplicates, "left out"),
                ("leaked by prompt", facts["num_leaked"], "another split has their prompt"),
            ],
        ),
        splits={split: len(parts[split]) for split in SPLITS},
        set_aside_reasons=Counter(bad["reason"] for bad in source.bad_rows),
        set_aside=tuple(SetAside(bad["where"], "bad", bad["reason"], bad["row"]) for bad in source.bad_rows[:100]),
        num_contradictions=facts["num_contradictions"],
        class_column=config.stratify_by if config.stratify_by != "none" else "",
        num_classes=len(set().union(*classes.values())),
        classes=class_balance(classes, 30),
        lengths=(
            Lengths("prompts", "characters", prompts.histogram()),
            Lengths("completions", "characters", completions.histogram()),
        ),
        samples=tuple(Sample(chat.id, "train", chat.messages) for chat in parts["train"][:5]),
    )
    write_report(path, findings)
