"""Logging and progress: one rewritten line in a terminal, one line every ten seconds in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

LOG_INTERVAL_S = 10.0
TERMINAL_INTERVAL_S = 0.2

log = logging.getLogger("slmops")

T = TypeVar("T")


def set_up_logging() -> None:
    """Send slmops' own log lines to standard error, once."""
    if log.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


class Progress:
    """Counts towards `total` and says how far it is and how long it will take.

    Use as a context manager; call `advance` as work gets done. `total` and the counts are in `unit`. A closing line
    is written only if anything was written before, so short work stays silent in a log.
    """

    def __init__(self, what: str, total: int, unit: str = "rows", done: int = 0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._first = done
        self._started = self._written_at = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._wrote = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if self._wrote and failure is None:
            self._write("")
        if self._wrote and self._terminal:
            sys.stderr.write("\n")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` to what is done; `note` is shown behind it (a loss, say)."""
        self.done += count
        interval = TERMINAL_INTERVAL_S if self._terminal else LOG_INTERVAL_S
        if time.monotonic() - self._written_at >= interval:
            self._write(note)

    def _write(self, note: str) -> None:
        self._written_at = time.monotonic()
        self._wrote = True
        elapsed = self._written_at - self._started
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        left = f", {_clock((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        text = f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {rate:.1f}/s, {_clock(elapsed)} so far{left}"
        text += f", {note}" if note else ""
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
        else:
            log.info("%s", text)


def track(items: Iterable[T], what: str, total: int, unit: str = "rows") -> Iterator[T]:
    """Yield `items` while showing progress."""
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
