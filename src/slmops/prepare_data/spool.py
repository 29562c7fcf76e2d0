"""Append-only files with a journal: what was committed survives a kill, what came after is cut off again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from slmops.errors import explain_full_disk

JOURNAL = "journal.json"
RECORDS_AT_ONCE = 65_536


class Spool:
    """Files in `directory`, appended to by name, all of them committed together.

    A directory that was written for another `key` is emptied. Use as a context manager.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any]) -> None:
        self.directory = directory
        self._key = dict(key)
        self._files: dict[str, IO[bytes]] = {}
        self._sizes: dict[str, int] = {}
        self.state: dict[str, Any] = {}
        """What was committed with the files; empty at first."""

    def __enter__(self) -> Self:
        journal = self._read_journal()
        if journal is None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
        else:
            self._sizes, self.state = journal["sizes"], journal["state"]
            for path in self.directory.iterdir():
                if path.name in self._sizes:
                    os.truncate(path, self._sizes[path.name])
                elif path.name != JOURNAL:
                    path.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def append(self, name: str, data: bytes | memoryview) -> None:
        """Add bytes to a file."""
        with explain_full_disk(self.directory / name):
            if name not in self._files:
                self._files[name] = open(self.directory / name, "ab", buffering=0)  # noqa: SIM115 - closed on exit
            view = memoryview(data).cast("B")
            while view:
                view = view[self._files[name].write(view) :]
        self._sizes[name] = self._sizes.get(name, 0) + memoryview(data).nbytes

    def commit(self, state: Mapping[str, Any]) -> None:
        """Make what was appended so far, and `state`, what a next run finds."""
        for file in self._files.values():
            os.fsync(file.fileno())
        partial = self.directory / (JOURNAL + ".partial")
        with explain_full_disk(partial), open(partial, "w") as journal:
            json.dump({"key": self._key, "sizes": self._sizes, "state": dict(state)}, journal)
            journal.flush()
            os.fsync(journal.fileno())
        os.replace(partial, self.directory / JOURNAL)
        self.state = dict(state)

    def size(self, name: str) -> int:
        """Bytes of a file so far."""
        return self._sizes.get(name, 0)

    def array(self, name: str, dtype: npt.DTypeLike, start: int = 0, count: int = -1) -> npt.NDArray[Any]:
        """`count` items from item `start` on, read into memory; all that follow if it is -1."""
        dtype = np.dtype(dtype)
        if not self.size(name):
            return np.empty(0, dtype)
        return np.fromfile(self.directory / name, dtype, count, offset=start * dtype.itemsize)

    def column(self, name: str, dtype: npt.DTypeLike, field: str) -> npt.NDArray[Any]:
        """One field of all records, without holding the others in memory."""
        dtype = np.dtype(dtype)
        num_records = self.size(name) // dtype.itemsize
        column = np.empty(num_records, dtype[field])
        for start in range(0, num_records, RECORDS_AT_ONCE):
            records = self.array(name, dtype, start, min(RECORDS_AT_ONCE, num_records - start))
            column[start : start + len(records)] = records[field]
        return column

    def records(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...], numbers: Any) -> npt.NDArray[Any]:
        """[len(numbers), *shape] records of a fixed size, by number."""
        width = np.dtype(dtype).itemsize * int(np.prod(shape))
        with open(self.directory / name, "rb", buffering=0) as file:
            descriptor = file.fileno()
            data = b"".join([os.pread(descriptor, width, number * width) for number in numbers.tolist()])
        return np.frombuffer(data, dtype).reshape(-1, *shape)

    def lines(self, name: str) -> Iterator[bytes]:
        """Lines of a text file."""
        if self.size(name):
            with open(self.directory / name, "rb") as file:
                yield from file

    def pieces(self, name: str, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Iterator[bytes]:
        """Parts of a file in any order."""
        if not len(starts):
            return
        with open(self.directory / name, "rb", buffering=0) as file:
            descriptor = file.fileno()
            for first in range(0, len(starts), RECORDS_AT_ONCE):
                some = slice(first, first + RECORDS_AT_ONCE)
                for start, end in zip(starts[some].tolist(), ends[some].tolist(), strict=True):
                    yield os.pread(descriptor, end - start, start)

    def _read_journal(self) -> dict[str, Any] | None:
        try:
            journal = json.loads((self.directory / JOURNAL).read_bytes())
            whole = all((self.directory / name).stat().st_size >= size for name, size in journal["sizes"].items())
        except (OSError, ValueError, KeyError):
            return None
        return journal if whole and journal["key"] == self._key else None
