"""Logging and progress: one rewritten line in a terminal, one line every ten seconds in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

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


class _Screen:
    """Where progress is shown: standard error, as it is now."""

    def __init__(self) -> None:
        self._terminal: TextIO | None = sys.stderr if sys.stderr.isatty() else None
        self.interval_s = TERMINAL_INTERVAL_S if self._terminal else LOG_INTERVAL_S
        self.wrote = False

    def write(self, text: str, note: str) -> None:
        """Show a line in place of the one before, or below it in a log."""
        self.wrote = True
        text += f", {note}" if note else ""
        if self._terminal:
            self._terminal.write(f"\r\x1b[K{text}")
            self._terminal.flush()
        else:
            _log_always(text)

    def close(self) -> None:
        if self.wrote and self._terminal:
            self._terminal.write("\n")


class Progress:
    """Counts towards `total` and says how far it is and how long it will take.

    Use as a context manager; call `advance` as work gets done. `total` and the counts are in `unit`. A closing line
    is written only if anything was written before, so short work stays silent in a log.
    """

    def __init__(self, what: str, total: int, unit: str = "rows", done: int = 0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._first = done
        self._started = self._written_at = time.monotonic()
        self._screen = _Screen()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        if self._screen.wrote and failure is None:
            self._write("")
        self._screen.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` to what is done; `note` is shown behind it (a loss, say)."""
        self.done += count
        if time.monotonic() - self._written_at >= self._screen.interval_s:
            self._write(note)

    def _write(self, note: str) -> None:
        self._written_at = time.monotonic()
        elapsed = self._written_at - self._started
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        left = f", {_clock((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        text = f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {rate:.1f}/s, {_clock(elapsed)} so far{left}"
        self._screen.write(text, note)


def track(items: Iterable[T], what: str, total: int, unit: str = "rows") -> Iterator[T]:
    """Yield `items` while showing progress."""
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


@contextmanager
def heartbeat(what: str, note: Callable[[], str]) -> Iterator[None]:
    """Show how long the body has taken, for work that cannot be counted; `note()` is shown behind it."""
    screen, started, ended = _Screen(), time.monotonic(), threading.Event()

    def beat() -> None:
        while not ended.wait(screen.interval_s):
            screen.write(f"{what}: {_clock(time.monotonic() - started)} so far", note())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        screen.close()


def _log_always(text: str) -> None:
    """`log.info`, also where a step holds back what its libraries log with `logging.disable`."""
    if log.getEffectiveLevel() <= logging.INFO:
        log.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, text, (), None))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
