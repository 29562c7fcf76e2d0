"""First pass: each row becomes a finished chat on disk, beside the numbers that the second pass decides by."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import xxhash

from slmops.errors import DataError
from slmops.languages import LanguageFilter
from slmops.prepare_data.chats import BadRow, ChatMaker, Messages, Recognised, as_dicts, ids_of, recognise
from slmops.prepare_data.config import PrepareDataConfig
from slmops.prepare_data.duplicates import SHINGLE_WORDS, MinHasher
from slmops.prepare_data.filters import LengthFilter, binary_reason, clean
from slmops.prepare_data.readers import Row
from slmops.prepare_data.sources import Source
from slmops.prepare_data.splitting import SPLITS, UNDECIDED
from slmops.prepare_data.spool import Spool
from slmops.prepare_data.tokens import TokenCounter
from slmops.prepare_data.words import Ragged, hash_runs, hash_words
from slmops.progress import log
from slmops.redaction import Redactor

CHATS, ROWS, BANDS, SIGNATURES, RUNS = "chats.jsonl", "rows.bin", "bands.bin", "signatures.bin", "runs.bin"
BAD_ROWS, SET_ASIDE = "bad_rows.jsonl", "set_aside.jsonl"

ROW = np.dtype(
    [
        ("id", "<u8"),
        ("prompt", "<u8"),  # id of the prompt
        ("stratum", "<u8"),  # hash of it; 0 for none
        ("group", "<u8"),  # hash of it; 0 for none
        ("record", "<u8"),  # hash of all that is written of the row
        ("end", "<i8"),  # where it ends in CHATS; it begins where the row before ends
        ("line", "<u4"),
        ("part", "<u2"),
        ("split", "<i1"),  # that the row itself names
        ("has_words", "?"),
        ("num_runs", "<u4"),
        ("prompt_chars", "<u4"),
        ("completion_chars", "<u4"),
        ("num_tokens", "<u4"),
    ]
)

CHUNK_ROWS = 10_000
CHUNK_CHARS = 8_000_000
MAX_SHOWN_CHARS = 2000
MAX_SHOWN_ITEMS = 100
MAX_REASON_CHARS = 300
MAX_VALUE_CHARS = 100
"""What a piece of personal data has at most, as far as it matters where a text is cut."""
MAX_STRATUM_CHARS = 80
MAX_REASONS = 200
"""Different reasons that are counted by themselves; they may hold a piece of the row."""
MAX_CACHED_CHARS = 200
"""Shorter turns are kept with their redacted form for a while: labels and system turns come again and again."""
MIN_LANGUAGE_CONFIDENCE = 0.9
"""Rows whose language is less sure than this stay."""


@dataclass
class Intake:
    """What the first pass found; small, and part of the spool's journal."""

    layout: str = ""
    why: str = ""
    columns: list[str] = field(default_factory=list)
    num_read: int = 0
    num_bad: int = 0
    num_cleaned: int = 0
    num_pii_rows: int = 0
    pii_values: Counter[str] = field(default_factory=Counter)
    pii_rows: Counter[str] = field(default_factory=Counter)
    bad_reasons: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    """Rows set aside by stage."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows set aside by reason."""
    chunk_rows: list[int] = field(default_factory=list)

    @classmethod
    def resumed(cls, state: Mapping[str, Any]) -> Intake:
        """What a run before has found."""
        counted = {name: Counter(value) for name, value in state.items() if isinstance(value, dict)}
        return cls(**{**state, **counted})


class _Taken(NamedTuple):
    """A row on its way into a chunk."""

    part: int
    line: int
    split: int
    messages: Messages
    own_prompt: str
    own_completion: str
    stratum: str
    group: str
    task: str

    @property
    def text(self) -> str:
        return "\n".join(content for _, content in self.messages)


class _SetAside(Exception):
    """A row that a setting keeps out: stage and reason, and its text as far as it may be shown."""

    def __init__(self, stage: str, reason: str, text: str) -> None:
        super().__init__(reason)
        self.stage, self.reason, self.text = stage, reason, text


def take_in(config: PrepareDataConfig, source: Source, spool: Spool, tokens: TokenCounter | None) -> Intake:
    """Read the source to its end, from where the spool's journal ends.

    Raises:
        ConfigError: a setting names a column that is not there.
        DataError: the source cannot be read, or has more than `max_rows` rows.
    """
    intake = Intake.resumed(spool.state) if spool.state else Intake()
    if intake.num_read:
        log.info("going on behind row %s of an unfinished run", f"{intake.num_read:,}")
    worker = _Worker(config, source, spool, tokens, intake)
    for part, row in source.rows(intake.num_read, config.split_column):
        intake.num_read += 1
        if intake.num_read > config.max_rows:
            raise DataError(
                f"{config.source_uri} has more than max_rows={config.max_rows:,} rows; raise it, or shorten the file"
            )
        worker.take(part, row)
    worker.finish_chunk()
    return intake


class ShownText:
    """Text that may be shown to people: without personal data, in UTF-8, and short."""

    def __init__(self, config: PrepareDataConfig) -> None:
        self._redactor = Redactor(names=config.pii_names)

    def of(self, text: str, max_chars: int = MAX_SHOWN_CHARS) -> str:
        """The beginning of `text` as it may be shown."""
        # Cut with a margin first: redacting megabytes takes long. A value that this cuts in two is not recognised, so
        # the end goes too, which matters where redacting made the text much shorter.
        margin = text[: 2 * max_chars + 2 * MAX_VALUE_CHARS]
        safe = self._redactor.redact(margin.encode("utf-8", "backslashreplace").decode())[0]
        return (safe if margin == text else safe[:-MAX_VALUE_CHARS])[:max_chars]

    def of_row(self, columns: Mapping[str, Any]) -> str:
        """The beginning of a raw row."""
        try:
            # Each text by itself, because JSON writes a line's end as a letter, which hides what it stands before; then
            # all of it, because a number may be a value, too.
            return self.of(json.dumps(self._without_values(columns), ensure_ascii=False, default=str))
        except (ValueError, RecursionError) as error:
            return f"cannot be shown: {error}"

    def _without_values(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.of(value)
        if isinstance(value, Mapping):
            names = list(value)[:MAX_SHOWN_ITEMS]
            return {self.of(str(name), 200): self._without_values(value[name]) for name in names}
        if isinstance(value, list | tuple):
            return [self._without_values(item) for item in value[:MAX_SHOWN_ITEMS]]
        return value


class _Worker:
    """Takes rows in, and writes them a chunk at a time."""

    def __init__(
        self, config: PrepareDataConfig, source: Source, spool: Spool, tokens: TokenCounter | None, intake: Intake
    ) -> None:
        self._config, self._source, self._spool, self._tokens, self._intake = config, source, spool, tokens, intake
        self._shown = ShownText(config)
        self._redactor = Redactor(names=config.pii_names) if config.pii != "off" else None
        self._redacted = lru_cache(maxsize=1024)(self._redact_text)
        self._length = LengthFilter(config.min_chars, config.max_chars)
        self._language = LanguageFilter(config.languages, MIN_LANGUAGE_CONFIDENCE) if config.languages else None
        self._hasher = MinHasher(config.near_duplicate_threshold) if config.near_duplicates != "off" else None
        self._maker: ChatMaker | None = None
        if intake.layout:
            self._maker = ChatMaker(config, Recognised(intake.layout, intake.why), intake.columns)  # type: ignore[arg-type]
        self._chunk: list[_Taken] = []
        self._num_chars = self._num_rows = 0

    def take(self, part: int, row: Row) -> None:
        """Make a chat of the row, or set it aside."""
        try:
            if row.problem:
                raise BadRow(row.problem)
            taken = self._taken(part, row)
        except BadRow as problem:
            self._write_bad(part, row, str(problem))
        except _SetAside as reason:
            self._write_aside(part, row.line, reason)
        else:
            self._chunk.append(taken)
            self._num_chars += sum(len(content) for _, content in taken.messages)
        self._num_rows += 1
        if len(self._chunk) >= CHUNK_ROWS or self._num_chars >= CHUNK_CHARS or self._num_rows >= 5 * CHUNK_ROWS:
            self.finish_chunk()

    def finish_chunk(self) -> None:
        """Write what was taken in, and commit."""
        chunk = self._chunk
        counts = np.zeros(len(chunk), np.uint32)
        if self._tokens and chunk:
            counts = self._tokens.count([taken.text for taken in chunk]).astype(np.uint32)
            for taken in (taken for taken, count in zip(chunk, counts, strict=True) if count > self._config.max_tokens):
                self._write_aside(taken.part, taken.line, _SetAside("length", "too many tokens", taken.text))
            chunk = [taken for taken, count in zip(chunk, counts, strict=True) if count <= self._config.max_tokens]
            counts = counts[counts <= self._config.max_tokens]
        if chunk:
            self._write(chunk, counts)
        self._spool.commit(vars(self._intake))
        self._chunk, self._num_chars, self._num_rows = [], 0, 0

    def _taken(self, part: int, row: Row) -> _Taken:
        maker = self._maker or self._first(row.columns)
        split = maker.split(row.columns)
        chat = maker.chat(row.columns)
        messages = self._cleaned(chat.messages)
        if self._redactor:
            messages = self._without_pii(messages)
        text = "\n".join(content for _, content in messages)
        if reason := self._length.reason(text):
            raise _SetAside("length", reason, text)
        if self._language and (reason := self._language.reason(f"{chat.own_prompt}\n{chat.own_completion}")):
            raise _SetAside("language", reason, text)
        stratum = maker.stratum(row.columns, messages)
        if self._config.stratify_by != "completion":  # which is redacted
            stratum = self._redacted(stratum)[0]
        return _Taken(
            part,
            row.line,
            SPLITS.index(split) if split else UNDECIDED,
            messages,
            chat.own_prompt,
            chat.own_completion,
            stratum,
            maker.group(row.columns),
            self._redacted(maker.task(row.columns))[0],
        )

    def _first(self, columns: Mapping[str, Any]) -> ChatMaker:
        recognised = recognise(self._config, columns)
        self._maker = ChatMaker(self._config, recognised, list(columns), self._shown.of)
        self._intake.layout, self._intake.why = recognised.layout, recognised.why
        self._intake.columns = list(columns)
        log.info(
            "%s is %s, because %s; layout %s, because %s",
            self._config.source_uri,
            self._source.format,
            self._source.why,
            recognised.layout,
            recognised.why,
        )
        return self._maker

    def _cleaned(self, messages: Messages) -> Messages:
        for _, content in messages:
            if reason := binary_reason(content):
                raise _SetAside("control characters", reason, clean(content))
        cleaned = tuple((role, clean(content)) for role, content in messages)
        if cleaned == messages:
            return messages
        if not all(content.strip() for _, content in cleaned):
            raise BadRow("a turn holds nothing but control characters")
        self._intake.num_cleaned += 1
        return cleaned

    def _redact_text(self, text: str) -> tuple[str, Counter[str]]:
        return self._redactor.redact(text) if self._redactor else (text, Counter())

    def _without_pii(self, messages: Messages) -> Messages:
        found: Counter[str] = Counter()
        redacted = []
        for role, content in messages:
            content, counts = (
                self._redacted(content) if len(content) <= MAX_CACHED_CHARS else self._redact_text(content)
            )
            redacted.append((role, content))
            if counts:
                found.update(counts)
        if not found:
            return messages
        self._intake.num_pii_rows += 1
        self._intake.pii_values += found
        self._intake.pii_rows += Counter(found.keys())
        if self._config.pii == "drop":
            text = "\n".join(content for _, content in redacted)
            raise _SetAside("personal data", f"personal data: {', '.join(sorted(found))}", text)
        return tuple(redacted)

    def _write(self, chunk: list[_Taken], num_tokens: np.ndarray) -> None:
        rows = np.zeros(len(chunk), ROW)
        lines = []
        end = self._spool.size(CHATS)
        for number, taken in enumerate(chunk):
            chat_id, prompt_id = ids_of(taken.messages)
            line = _line(chat_id, taken)
            lines.append(line)
            end += len(line)
            prompt_chars = sum(len(content) for _, content in taken.messages[:-1])
            rows[number] = (
                int(chat_id, 16),
                int(prompt_id, 16),
                _hash(taken.stratum),
                _hash(taken.group),
                xxhash.xxh3_64_intdigest(line + taken.group.encode()),
                end,
                taken.line,
                taken.part,
                taken.split,
                True,
                0,
                prompt_chars,
                len(taken.messages[-1][1]),
                num_tokens[number],
            )
        self._write_hashes(chunk, rows)
        self._spool.append(CHATS, b"".join(lines))
        self._spool.append(ROWS, rows.tobytes())
        self._intake.chunk_rows.append(len(chunk))

    def _write_hashes(self, chunk: list[_Taken], rows: np.ndarray) -> None:
        """What near duplicates and leaks are found by; sets `has_words` and `num_runs` of the rows."""
        if self._hasher is None and self._config.leakage == "off":
            return
        own = hash_words([text for taken in chunk for text in (taken.own_prompt, taken.own_completion)])
        if self._hasher:
            shingles = hash_runs(Ragged(own.values, own.starts[::2]), SHINGLE_WORDS)
            signatures, bands = self._hasher.sign(shingles)
            rows["has_words"] = shingles.lengths > 0
            self._spool.append(SIGNATURES, np.ascontiguousarray(signatures).data)
            self._spool.append(BANDS, bands.data)
        if self._config.leakage != "off":
            prompts = np.arange(len(own.lengths)) % 2 == 0
            runs = hash_runs(own.pick(prompts), self._config.leakage_ngram)
            rows["num_runs"] = runs.lengths
            self._spool.append(RUNS, runs.values.data)

    def _write_bad(self, part: int, row: Row, problem: str) -> None:
        self._intake.num_bad += 1
        reason = self._shown.of(problem, MAX_REASON_CHARS)
        reasons = self._intake.bad_reasons
        reasons[reason if reason in reasons or len(reasons) < MAX_REASONS else "other reasons"] += 1
        bad = {"where": self._where(part, row.line), "reason": reason, "row": self._shown.of_row(row.columns)}
        self._spool.append(BAD_ROWS, _json_line(bad))

    def _write_aside(self, part: int, line: int, reason: _SetAside) -> None:
        self._intake.stages[reason.stage] += 1
        self._intake.reasons[reason.reason] += 1
        self._spool.append(
            SET_ASIDE,
            aside_line(self._where(part, line), reason.stage, reason.reason, self._shown.of(reason.text)),
        )

    def _where(self, part: int, line: int) -> str:
        return f"{self._source.parts[part].name}:{line}"


def aside_line(where: str, stage: str, reason: str, text: str) -> bytes:
    """A line of set_aside.jsonl."""
    return _json_line({"where": where, "stage": stage, "reason": reason, "text": text})


_encode: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False).encode


def _json_line(value: Mapping[str, Any]) -> bytes:
    return _encode(value).encode() + b"\n"


def _line(chat_id: str, taken: _Taken) -> bytes:
    stratum = taken.stratum
    if len(stratum) > MAX_STRATUM_CHARS:
        stratum = stratum[: MAX_STRATUM_CHARS - 1] + "…"
    return _json_line({"id": chat_id, "messages": as_dicts(taken.messages), "stratum": stratum, "task": taken.task})


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode()) if text else 0
