"""A training that is asked to end keeps what it has."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Whether one of `SIGNALS` came."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def noticed() -> Iterator[Interruption]:
    """Note the signal, so that the step at work can end; a second one ends the process at once, as it would have.

    Outside the main thread, where Python takes no signals, nothing changes.
    """
    found = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, _: FrameType | None) -> None:
        found.signal = signal.Signals(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
