"""What every step has around it: log lines, one clear line for an error, an exit code that says whether to retry."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from slmops.errors import SlmopsError
from slmops.progress import set_up_logging
from slmops.relay import reach_store_of_environment

TERMINATION_LOG = "SLMOPS_TERMINATION_LOG"
"""Environment variable: the file that takes the error of a failed step. Kubernetes shows /dev/termination-log."""

RUNNER_PID = "SLMOPS_RUNNER_PID"
"""Environment variable: the process that runs the pipeline on this machine; a step does not outlive it."""

RUNNER_POLL_S = 0.5


@contextmanager
def step(name: str) -> Iterator[None]:
    """Run the body of a component; end the process with the error's exit code if it raises one of ours."""
    set_up_logging()
    if runner := os.environ.get(RUNNER_PID):
        threading.Thread(target=_end_with, args=(int(runner),), daemon=True).start()
    reach_store_of_environment()
    try:
        yield
    except SlmopsError as error:
        fail(f"{name}: {error}", error.exit_code)


def fail(message: str, exit_code: int) -> NoReturn:
    """End the process: the message goes to standard error and, with the exit code, to the termination log."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    with suppress(OSError):
        termination_log().write_text(f"{message}\nexit code {exit_code}")
    raise SystemExit(exit_code)


def termination_log() -> Path:
    return Path(os.environ.get(TERMINATION_LOG, "/dev/termination-log"))


def _end_with(runner: int) -> None:
    """End this process once `runner` is gone: nobody would take its result, and the next run wants its work."""
    while True:
        try:
            os.kill(runner, 0)
        except ProcessLookupError:
            os._exit(75)
        time.sleep(RUNNER_POLL_S)
