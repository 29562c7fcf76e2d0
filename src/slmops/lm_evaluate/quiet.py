"""lm_eval without its noise: progress is ours, and so is what is logged."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

NOISY = ("lm_eval", "datasets", "evaluate", "huggingface_hub")
NO_PROCESSES = "DISABLE_MULTIPROC"
"""Environment variable of lm_eval: resample in this process, as forking one that computes in threads may hang it."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what lm_eval and its libraries log below an error, print, warn of, and draw."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in NOISY}
    before = os.environ.get(NO_PROCESSES)
    os.environ[NO_PROCESSES] = "1"
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), _no_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
        os.environ.pop(NO_PROCESSES)
        if before is not None:
            os.environ[NO_PROCESSES] = before


@contextmanager
def _no_bars() -> Iterator[None]:
    """tqdm draws nothing: lm_eval opens bars in a dozen places, and some have no switch."""
    from tqdm.std import tqdm

    draw = tqdm.__init__

    def silent(bar: Any, *args: Any, **options: Any) -> None:
        draw(bar, *args, **(options | {"disable": True}))

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = draw


class Count:
    """How far the requests of one kind are; what a heartbeat shows."""

    def __init__(self) -> None:
        self._what, self._done, self._total = "preparing", 0, 0

    def start(self, what: str, total: int) -> None:
        self._what, self._done, self._total = what, 0, total

    def advance(self, count: int = 1) -> None:
        self._done += count

    def note(self) -> str:
        """`generate_until: 12 of 400 requests`; requests that share their computation count once."""
        return f"{self._what}: {self._done:,} of {self._total:,} requests" if self._total else self._what
