"""What people see of long work, in a terminal and in a log."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator

import pytest

from slmops import progress
from slmops.progress import Progress, heartbeat


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", 0.05)
    monkeypatch.setattr(progress.log, "propagate", True)
    with caplog.at_level(logging.INFO, logger="slmops"):
        yield caplog


def test_a_heartbeat_tells_the_time_and_the_stage_also_while_libraries_are_held_back(
    logged: pytest.LogCaptureFixture,
) -> None:
    stages = iter(["", "reading"])
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with heartbeat("building", lambda: next(stages, "writing")):
            time.sleep(0.3)
    finally:
        logging.disable(disabled)
    assert logged.messages[:3] == [
        "building: 0:00 so far", "building: 0:00 so far, reading", "building: 0:00 so far, writing",
    ]  # fmt: skip
    count = len(logged.messages)
    time.sleep(0.15)
    assert len(logged.messages) == count, "it ends with its body"


def test_a_heartbeat_ends_when_its_body_fails(logged: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="no"), heartbeat("building", str):
        raise ValueError("no")
    time.sleep(0.15)
    assert not logged.messages


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "TERMINAL_INTERVAL_S", 0.0)
    with Progress("reading", 2) as shown:
        shown.advance()
        shown.advance(note="loss 1.5")
    *lines, last = terminal.getvalue().split("\r\x1b[K")[1:]
    assert lines[0].startswith("reading: 1/2 rows, ")
    assert lines[1].endswith(", loss 1.5")
    assert last.endswith(" so far\n")


def test_short_work_is_silent_in_a_log(logged: pytest.LogCaptureFixture) -> None:
    with Progress("reading", 1000) as shown:
        shown.advance(1000)
    assert not logged.messages
