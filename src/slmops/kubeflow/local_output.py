"""What KFP's local runner says, taken apart: tasks' events from its log records, steps' own lines from its prints."""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TextIO

from slmops.kubeflow.compile import Compiled

_COLOR = re.compile(r"\x1b\[\d+m")
_STARTED = re.compile(r"Executing task '(?P<component>.+)'$")
_ENDED = re.compile(r"Task '(?P<component>.+)' finished with status (?P<status>SUCCESS|FAILURE)$")
_CACHED = re.compile(r"Task (?P<task>.+) cache hit \(key=(?P<key>[0-9a-f]+)\)")

STEP_INDENT = "    "
"""KFP's local runner puts this before each line of a step, and before none of its own."""

Status = Literal["running", "succeeded", "failed", "cached"]


@dataclass
class TaskRun:
    """How one task went."""

    display_name: str
    component: str
    status: Status = "running"
    duration_s: float = 0.0
    round: int | None = None
    """Which round of its loop, from 0; None outside of loops."""
    cache_key: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    """Path of each output artifact by name."""


class TaskEvents(logging.Filter):
    """A filter on the root logger that keeps a TaskRun per task, and swallows KFP's records unless `verbose`."""

    def __init__(self, compiled: Compiled, out: TextIO, on_start: Callable[[], None], verbose: bool) -> None:
        super().__init__()
        self.runs: list[TaskRun] = []
        self._compiled, self._out, self._on_start, self._verbose = compiled, out, on_start, verbose
        self._tasks = {task.component: task for task in compiled.tasks.values()}
        self._started = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        message = _COLOR.sub("", record.getMessage())
        if match := _STARTED.match(message):
            self._start(match["component"])
        elif match := _ENDED.match(message):
            self._end(match["status"] == "SUCCESS")
        elif match := _CACHED.match(message):
            self._cached(match["task"], match["key"])
        return self._verbose or record.levelno >= logging.WARNING

    @property
    def failed(self) -> TaskRun | None:
        """The task that failed, if one did and was not run again."""
        return next((run for run in reversed(self.runs) if run.status == "failed"), None)

    def _start(self, component: str) -> None:
        self._on_start()
        self._started = time.monotonic()
        # A retry replaces what it repeats.
        self.runs = [run for run in self.runs if run.component != component or run.status in ("succeeded", "cached")]
        self.runs.append(self._run(component))
        self._say(self.runs[-1].display_name)

    def _run(self, component: str) -> TaskRun:
        """A task that begins; in a loop, the round that follows those that are done."""
        task = self._tasks.get(component)
        if task is None or not task.rounds:
            return TaskRun(task.display_name if task else component, component)
        number = sum(run.component == component for run in self.runs)
        about = task.rounds[number] if number < len(task.rounds) else str(number)
        return TaskRun(f"{task.display_name}-{about}", component, round=number)

    def _end(self, success: bool) -> None:
        run = self.runs[-1]
        run.status = "succeeded" if success else "failed"
        run.duration_s = round(time.monotonic() - self._started, 3)

    def _cached(self, task_name: str, key: str) -> None:
        run = self._run(self._compiled.tasks[task_name].component)
        run.status, run.cache_key = "cached", key
        self.runs.append(run)
        self._say(f"{run.display_name}: done before, taken from the cache")

    def _say(self, text: str) -> None:
        self._out.write(f"{text}\n")
        self._out.flush()


class StepLines(io.TextIOBase):
    """Stands in for standard output while KFP runs: passes on what the steps print, and not what KFP prints."""

    _OWN = re.compile(r"\[KFP Executor [^\]]* (INFO|DEBUG)\]: ")

    def __init__(self, out: TextIO) -> None:
        self.last = ""
        """The last line of a step that was not blank."""
        self._out = out
        self._pending = ""
        self._in_executor_input = False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            if line.startswith(STEP_INDENT):
                self._pass_on(line.removeprefix(STEP_INDENT))
        return len(text)

    def _pass_on(self, line: str) -> None:
        if self._in_executor_input:
            self._in_executor_input = line != "}"
        elif match := self._OWN.match(line):
            self._in_executor_input = line[match.end() :].startswith("Got executor_input:")
        elif line.strip():
            self.last = line.rstrip()
            self._out.write(f"  {self.last}\n")  # not print: KFP replaces that while a step runs
            self._out.flush()
