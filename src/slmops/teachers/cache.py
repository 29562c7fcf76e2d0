"""Answers that were given once are not asked, computed or paid for again: in no later run, shard or pipeline.

    <directory>/<digest of teacher and decoding>/about.json       in words, what the answers below are
                                                 <unique>.jsonl   one answer a line: ["<CRC-32>",{"key":"<32 hex>",…}]
                                                 <unique>.logits  their logits, as raw records

Each process appends to a segment of its own and changes no other file, so any number of processes on any number of
nodes share a directory without locks, also on a network file system. A line is one write, logits first: a process that
is killed leaves at most a last line without an end, which readers leave out.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from binascii import unhexlify
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np

from slmops.errors import explain_os_errors
from slmops.progress import Progress, log
from slmops.teachers.interface import Answer, Decoding

FORMAT = 1
ABOUT = "about.json"
SYNC_INTERVAL_S = 5.0
"""A kill of the process loses nothing; the loss of the node at most this much."""
READ_BYTES = 8 * 1024 * 1024
OPEN_SEGMENTS = 64
"""Files kept open for reading: with many shards and restarts there may be thousands of segments."""

# ["0123abcd",{"key":"<32 hex>",
_BODY = 12
_KEY = slice(_BODY + 8, _BODY + 40)
_OFFSET_BITS = 40
_DROPPED = (1 << 64) - 1


class AnswerCache:
    """The answers of one teacher with one way of decoding.

    What others write after it was opened is not seen. One thread may use it at a time. It takes 24 bytes of memory an
    answer, and more for the last few thousand that were put.
    """

    def __init__(self, directory: Path, identity: Mapping[str, str | int | float], decoding: Decoding) -> None:
        """Read which answers are in `directory`; nothing is written before the first `put`.

        Raises:
            ArtifactError: the directory cannot be read.
        """
        self.about = {"format": FORMAT, "teacher": dict(identity), "decoding": _deciding(decoding)}
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:32]
        self.path = directory / digest
        self.num_damaged = 0
        """Records that are not what was written: left out, so they are asked again."""
        self._index = _Index()
        self._names: list[str] = []
        self._reading: dict[tuple[int, str], int] = {}
        self._own: _Segment | None = None
        with explain_os_errors(directory):
            self._read_segments()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return self._index.find(key) is not None

    def get(self, key: str) -> Answer | None:
        """The answer to the question with this key, or None if there is none (or it was damaged meanwhile)."""
        position = self._index.find(key)
        if position is None:
            return None
        number, offset = position >> _OFFSET_BITS, position & ((1 << _OFFSET_BITS) - 1)
        with explain_os_errors(self.path):
            line = self._line(number, offset)
            if line is not None and line[_KEY] == key.encode():
                fields = json.loads(line)[1]
                stored = fields.pop("logits", None)
                logits = self._read_logits(number, stored) if stored else None
                if logits is not None or not stored:
                    return _answer(fields, logits)
        self._index.drop(key)
        self._damaged(f"{self._names[number]}.jsonl at byte {offset}")
        return None

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer: once this returns, no kill of the process takes it away. The first answer to a key stays.

        Raises:
            DiskFullError: nothing of this answer was kept; those before it are.
        """
        if key in self:
            return
        with explain_os_errors(self.path):
            if self._own is None:
                self._own = self._start_segment()
            self._index.add(key, self._own.number << _OFFSET_BITS | self._own.append(key, answer))

    def close(self) -> None:
        """Bring what was put to the disk, and close all files."""
        for descriptor in self._reading.values():
            os.close(descriptor)
        self._reading.clear()
        if self._own is not None:
            own, self._own = self._own, None
            with explain_os_errors(self.path):
                own.close()

    def _read_segments(self) -> None:
        # In the order of their names, so that all readers take the same answer if two processes asked the same.
        segments = sorted(path for path in self.path.iterdir() if path.suffix == ".jsonl") if self.path.is_dir() else []
        sizes = [path.stat().st_size for path in segments]
        with Progress("reading cached answers", sum(sizes), "bytes") as progress:
            for path, size in zip(segments, sizes, strict=True):
                self._names.append(path.stem)
                with open(path, "rb") as file:
                    self._read_segment(len(self._names) - 1, file, size, progress)
        self._index.settle()
        if self.num_damaged:
            log.warning("%s: %d damaged records are left out and asked again", self.path, self.num_damaged)

    def _read_segment(self, number: int, file: Any, size: int, progress: Progress) -> None:
        start = number << _OFFSET_BITS
        rest = b""
        while size > 0 and (block := file.read(min(READ_BYTES, size))):
            size -= len(block)
            *lines, rest = (rest + block).split(b"\n")
            keys, positions = [], []
            for line in lines:
                if _intact(line):
                    keys.append(line[_KEY])
                    positions.append(start)
                else:
                    self.num_damaged += 1
                start += len(line) + 1
            self._index.add_many(unhexlify(b"".join(keys)), positions)
            progress.advance(len(block))

    def _line(self, number: int, offset: int) -> bytes | None:
        """The line at `offset` of a segment, or None if it is not what was written."""
        descriptor = self._open(number, ".jsonl")
        line, length = b"", 2048
        while not (found := line.find(b"\n") + 1):
            more = os.pread(descriptor, length, offset + len(line))
            if not more:
                return None
            line, length = line + more, length * 2
        return line[: found - 1] if _intact(line[: found - 1]) else None

    def _read_logits(self, number: int, stored: Mapping[str, Any]) -> np.ndarray | None:
        """The records that a line names, or None if they are not what was written."""
        dtype = np.dtype(
            [tuple(tuple(part) if isinstance(part, list) else part for part in f) for f in stored["dtype"]]
        )
        descriptor = self._open(number, ".logits")
        data, size = b"", stored["num"] * dtype.itemsize
        while len(data) < size and (more := os.pread(descriptor, size - len(data), stored["offset"] + len(data))):
            data += more
        whole = len(data) == size and zlib.crc32(data) == stored["crc"]
        return np.frombuffer(data, dtype) if whole else None

    def _open(self, number: int, suffix: str) -> int:
        descriptor = self._reading.get((number, suffix))
        if descriptor is None:
            if len(self._reading) >= OPEN_SEGMENTS:
                os.close(self._reading.pop(next(iter(self._reading))))
            descriptor = os.open(self.path / (self._names[number] + suffix), os.O_RDONLY | os.O_CLOEXEC)
            self._reading[number, suffix] = descriptor
        return descriptor

    def _damaged(self, where: str) -> None:
        self.num_damaged += 1
        log.warning("%s/%s: a damaged record is left out; it is asked again", self.path, where)

    def _start_segment(self) -> _Segment:
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_about()
        name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex}"
        self._names.append(name)
        return _Segment(len(self._names) - 1, self.path / name)

    def _write_about(self) -> None:
        path = self.path / ABOUT
        if path.exists():
            return
        partial = path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            partial.write_text(json.dumps({"what": _words(self.about), **self.about}, indent=2) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


class _Segment:
    """The files that this process appends to."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        self._path = path
        self._lines = _File(path.with_suffix(".jsonl"))
        self._logits: _File | None = None
        self._synced_at = time.monotonic()

    def append(self, key: str, answer: Answer) -> int:
        """Write an answer; returns the byte where its line starts."""
        fields = {"key": key, **_fields(answer)}
        if answer.logits is not None:
            fields["logits"] = self._append_logits(answer.logits)
        body = json.dumps(fields, separators=(",", ":")).encode()
        start = self._lines.append(b'["%08x",%b]\n' % (zlib.crc32(body), body))
        if time.monotonic() - self._synced_at > SYNC_INTERVAL_S:
            self._sync()
        return start

    def close(self) -> None:
        self._sync()
        for file in (self._logits, self._lines):
            if file is not None:
                file.close()

    def _append_logits(self, records: np.ndarray) -> dict[str, Any]:
        if self._logits is None:
            self._logits = _File(self._path.with_suffix(".logits"))
        data = records.tobytes()
        start = self._logits.append(data)
        return {"offset": start, "num": len(records), "dtype": records.dtype.descr, "crc": zlib.crc32(data)}

    def _sync(self) -> None:
        for file in (self._logits, self._lines):
            if file is not None:
                file.sync()
        self._synced_at = time.monotonic()


class _File:
    """A new file that grows by whole records."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._size = 0

    def append(self, data: bytes) -> int:
        """Append all of `data` or nothing; returns where it starts."""
        start, rest = self._size, memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, start)
            raise
        self._size += len(data)
        return start

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class _Index:
    """Where the answer to each key lies: sorted arrays, 24 bytes an answer, and a small dict in front for what is new.

    A position is the number of a segment in the upper 24 bits, and the byte where the line starts in the lower 40.
    """

    MIN_FRESH = 16384

    def __init__(self) -> None:
        self._high, self._low, self._positions = (np.empty(0, dtype=np.uint64) for _ in range(3))
        self._fresh: dict[bytes, int] = {}
        self._blocks: list[tuple[bytes, list[int]]] = []
        self._num_in_blocks = self._num = 0

    def __len__(self) -> int:
        return self._num

    def find(self, key: str) -> int | None:
        """The position that was added with `key`, or None."""
        raw = unhexlify(key)
        if (fresh := self._fresh.get(raw)) is not None:
            return None if fresh == _DROPPED else fresh
        high, low = (np.uint64(int.from_bytes(raw[part])) for part in (slice(8), slice(8, 16)))
        at = int(self._high.searchsorted(high))
        while at < len(self._high) and self._high[at] == high:
            if self._low[at] == low:
                return int(self._positions[at])
            at += 1
        return None

    def add(self, key: str, position: int) -> None:
        """Add a key that is not there."""
        self._fresh[unhexlify(key)] = position
        self._num += 1
        # In proportion to all, so that the time for merging stays linear in the number of answers.
        if len(self._fresh) > max(self.MIN_FRESH, len(self._high) // 32):
            self._merge_fresh()

    def drop(self, key: str) -> None:
        """Forget a key that is there."""
        self._fresh[unhexlify(key)] = _DROPPED
        self._num -= 1

    def add_many(self, keys: bytes, positions: list[int]) -> None:
        """Add keys of 16 bytes each, one after the other; of those that are there already the old position stays."""
        self._blocks.append((keys, positions))
        self._num_in_blocks += len(positions)
        if self._num_in_blocks > max(self.MIN_FRESH, len(self._high) // 2):
            self.settle()

    def settle(self) -> None:
        """Take in what `add_many` was given."""
        keys = np.frombuffer(b"".join(keys for keys, _ in self._blocks), dtype=">u8").astype(np.uint64).reshape(-1, 2)
        positions = np.fromiter((at for _, block in self._blocks for at in block), np.uint64, self._num_in_blocks)
        self._blocks, self._num_in_blocks = [], 0
        old = (self._high, self._low, self._positions)
        self._merge(old, (keys[:, 0], keys[:, 1], positions))

    def _merge_fresh(self) -> None:
        keys = np.frombuffer(b"".join(self._fresh), dtype=">u8").astype(np.uint64).reshape(-1, 2)
        positions = np.fromiter(self._fresh.values(), np.uint64, len(self._fresh))
        self._fresh = {}
        self._merge((keys[:, 0], keys[:, 1], positions), (self._high, self._low, self._positions))

    def _merge(self, first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> None:
        """Sort both into one; of a key in both, what `first` says stays."""
        high, low, positions = (np.concatenate(pair) for pair in zip(first, second, strict=True))
        order = high.argsort(kind="stable")
        high, low, positions = high[order], low[order], positions[order]
        kept = np.ones(len(high), dtype=bool)
        kept[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        kept &= positions != _DROPPED
        self._high, self._low, self._positions = high[kept], low[kept], positions[kept]
        self._num = len(self._high)


def _deciding(decoding: Decoding) -> dict[str, Any]:
    """The settings that change what is kept; others must not cause a second question."""
    settings = asdict(decoding)
    if decoding.greedy:
        del settings["temperature"], settings["top_p"]
    if not decoding.logits_top_k:
        del settings["logits_temperature"]
    return settings


def _words(about: Mapping[str, Any]) -> str:
    teacher, decoding = (
        ", ".join(f"{name} {value}" for name, value in about[part].items()) for part in ("teacher", "decoding")
    )
    return (
        f"Answers of a teacher, kept by slmops so that nothing is asked twice. The teacher: {teacher}. How it answers: "
        f"{decoding}. May be deleted when no step runs; what is needed is asked again then."
    )


def _intact(line: bytes) -> bool:
    return line[:2] == b'["' and line[-1:] == b"]" and line[2:10] == b"%08x" % zlib.crc32(line[_BODY:-1])


def _fields(answer: Answer) -> dict[str, Any]:
    """What differs from an empty answer, without the logits."""
    fields: dict[str, Any] = {"text": answer.text, "finish_reason": answer.finish_reason, "model": answer.model}
    for name in ("num_prompt_tokens", "num_tokens", "token_ids", "top_logprobs"):
        if value := getattr(answer, name):
            fields[name] = value
    return fields


def _answer(fields: dict[str, Any], logits: np.ndarray | None) -> Answer:
    del fields["key"]
    for name in ("token_ids", "top_logprobs"):
        fields[name] = tuple(fields.get(name, ()))
    return Answer(**fields, logits=logits)
