"""What every step has around it: log lines, one clear line for an error, an exit code that says whether to retry."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from slmops.errors import SlmopsError, Stopped, TransientError
from slmops.progress import log, set_up_logging
from slmops.relay import reach_store_of_environment

TERMINATION_LOG = "SLMOPS_TERMINATION_LOG"
"""Environment variable: the file that takes the error of a failed step. Kubernetes shows /dev/termination-log."""

RUNNER_PID = "SLMOPS_RUNNER_PID"
"""Environment variable: the process that runs the pipeline on this machine; a step does not outlive it."""

TRANSIENT_RETRIES = "SLMOPS_TRANSIENT_RETRIES"
"""Environment variable: how often a step is started again after an error that trying again may help."""

_ATTEMPT = "SLMOPS_ATTEMPT"
RUNNER_POLL_S = 0.5
FIRST_PAUSE_S = 10.0
MAX_PAUSE_S = 300.0


@contextmanager
def step(name: str) -> Iterator[None]:
    """Run the body of a component; end the process with the error's exit code if it raises one of ours.

    After a TransientError the process starts itself again, up to $SLMOPS_TRANSIENT_RETRIES times, with pauses that
    double: KFP can retry a step on any failure or on none, and a misspelt address is not worth three GPU pods.
    """
    set_up_logging()
    if runner := os.environ.get(RUNNER_PID):
        threading.Thread(target=_end_with, args=(int(runner),), daemon=True).start()
    reach_store_of_environment()
    try:
        yield
    except SlmopsError as error:
        if isinstance(error, TransientError) and not isinstance(error, Stopped):
            _start_again(name, error)
        fail(f"{name}: {error}", error.exit_code)


def _start_again(name: str, error: TransientError) -> None:
    """Replace this process by a new one with the same command line; return if no retry is left."""
    attempt, retries = int(os.environ.get(_ATTEMPT, "1")), int(os.environ.get(TRANSIENT_RETRIES, "0"))
    if attempt > retries:
        return
    pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)) * random.uniform(0.8, 1.2)
    log.warning("%s: %s; trying again in %.0f s (%d of %d)", name, error, pause_s, attempt, retries)
    time.sleep(pause_s)
    os.environ[_ATTEMPT] = str(attempt + 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - the command line that started this process


def path_of(artifact: Any) -> Path | None:
    """Where an input artifact lies that a component may go without; None if it was not given."""
    return None if artifact is None else Path(artifact.path)


def paths_of(collected: Sequence[Any]) -> list[Path]:
    """Where the artifacts of a loop lie."""
    return [Path(artifact.path) for artifact in collected]


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
