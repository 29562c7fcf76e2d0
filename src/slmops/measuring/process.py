"""Runs the measured process under the limits of a device, some times over, and makes facts of what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import Field

from slmops.config import Config
from slmops.device_classes import DeviceClass
from slmops.errors import ModelError, SlmopsError
from slmops.measuring import limits, place
from slmops.measuring.limits import Limits, MemoryGroup
from slmops.measuring.summary import summarize_repeats
from slmops.progress import Progress

WORKER = "slmops.measuring.worker"
MAX_WORDS_BYTES = 4096
"""Of the last line that a process has written before it died."""


class Task(Config):
    """What to measure of a model. It reaches a pod on a device as JSON, so it is read as strictly as settings are."""

    quantized: bool
    """Whether the model is a quantized variant; else a Hugging Face directory."""
    by_token: bool = False
    """Whether its runtime can be driven token by token; else only whole requests are measured."""
    dtype: str = Field(default="float32", pattern=r"^[a-z0-9]{1,20}$")
    """Compute type of a Hugging Face directory."""
    num_threads: int = Field(ge=1, le=1024)
    """Threads of the runtime; with a device class it is the class's number of CPUs that counts."""
    max_new_tokens: int = Field(ge=1, le=32768)
    """Longest answer in tokens."""
    warmup_prompts: list[list[dict[str, str]]] = Field(default=[])
    """Conversations that are answered first, and not counted."""
    prompts: list[list[dict[str, str]]] = Field(min_length=1)
    """Conversations whose answers are measured, one after the other."""
    prompt_lengths: list[int] = Field(default=[])
    """Tokens of the prompts for which the time to the first token is measured, too."""
    streams: list[int] = Field(default=[])
    """Numbers of answers at once for which the speed is measured."""
    num_repeats: int = Field(default=1, ge=1, le=100)
    """Processes that measure all of it, one after the other."""
    noise_threshold: float = Field(default=0.1, gt=0, le=10)
    """Largest spread of a quiet measurement."""
    device_class: DeviceClass | None = None
    """Whose limits the process is under; None for all of this machine."""


@dataclass(frozen=True)
class Outcome:
    """What is known of a model after it was measured, or could not be."""

    facts: dict[str, Any]
    """With `status`: `measured`; or `failed` or `not_run`, and then `reason`."""
    requests: list[dict[str, float]] = field(default_factory=list)


class Died(Exception):
    """The measured process ended without a result."""

    def __init__(self, returncode: int, last_words: str, *, out_of_memory: bool) -> None:
        how = f"by {signal.Signals(-returncode).name}" if returncode < 0 else f"with code {returncode}"
        super().__init__(f"ended {how}: {last_words}")
        self.out_of_memory = out_of_memory


def measure(directory: Path, task: Task) -> Outcome:
    """Measure the model in `directory` as `task` says.

    What happens to a model under the limits of a device class is a result: a process that is ended for its memory, or a
    model that does not load, has failed. Without a class there are no limits to fail, so it is an error.

    Raises:
        ModelError: without a class, the model cannot be loaded, or the process died.
    """
    device = task.device_class
    if device is None:
        try:
            return _measured(task, _repeat(directory, task, None, None))
        except Died as death:
            raise ModelError(f"the process that measured {directory} {death}") from None
    if reason := place.not_this_device(device):
        return Outcome({"status": "not_run", "reason": reason})
    under = Limits(device.num_cpus, device.ram_mib * limits.MIB)
    facts = {"cpu": place.cpu_name(), **place.differences(device)}
    with limits.memory_group(under.ram_bytes) as group:
        facts["limits"] = "cgroup" if group or limits.holds_already(under.ram_bytes) else "judged"
        try:
            outcome = _measured(task, _repeat(directory, task, under, group))
        except Died as death:
            reason = limits.killed(under.ram_bytes) if death.out_of_memory else f"the process {death}"
            return Outcome(facts | {"status": "failed", "reason": reason})
    if reason := limits.judge(outcome.facts["peak_rss_bytes_max"], under.ram_bytes):
        facts |= {"status": "failed", "reason": reason}
    return Outcome(outcome.facts | facts, outcome.requests)


def run_worker(
    directory: Path, task: Task, under: Limits | None, group: MemoryGroup | None, progress: Progress | None = None
) -> dict[str, Any]:
    """Start the worker, follow it, and return its last line, with `cold_start_s`: from its start to its first token.

    Raises:
        Died: it ended without one.
        SlmopsError: it could not enter its cgroup.
    """
    cpus = limits.choose_cpus(under.num_cpus) if under else []
    num_threads = len(cpus) or task.num_threads
    work = task.model_dump(exclude={"num_repeats", "noise_threshold", "device_class"}) | {
        "directory": str(directory.resolve()),
        "num_threads": num_threads,
        "cpus": cpus,
        "context_length": task.device_class.context_length if task.device_class else None,
    }
    argv = [sys.executable, "-m", WORKER]
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    killed_before = limits.num_killed(group)
    # The task in a file: a pipe would break under a worker that dies before it has read it.
    with tempfile.TemporaryFile("w+") as task_file, tempfile.TemporaryFile() as errors:
        json.dump(work, task_file)
        task_file.seek(0)
        started_at = time.monotonic()
        with subprocess.Popen(  # noqa: S603 - our own worker
            group.command(argv) if group else argv,
            stdin=task_file,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",  # what native libraries write is any bytes
            env=environment,
        ) as worker:
            try:
                result, first_token_at = _follow(worker, progress)
            finally:
                worker.kill()
        if result is not None and worker.returncode == 0:
            return result | {"cold_start_s": first_token_at - started_at}
        words = _last_line(errors)
    if group and worker.returncode == limits.CANNOT_JOIN:
        raise SlmopsError(f"the measured process cannot enter {group.path}: {words}")
    raise Died(worker.returncode, words, out_of_memory=limits.num_killed(group) > killed_before)


def _last_line(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_WORDS_BYTES))
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def _follow(worker: subprocess.Popen[str], progress: Progress | None) -> tuple[dict[str, Any] | None, float]:
    """Its result, if it came to that, and when it had its first token, by the clock that all processes share."""
    result, first_token_at = None, 0.0
    assert worker.stdout is not None  # noqa: S101
    for line in worker.stdout:
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if not isinstance(said, dict):  # a native library that writes where it should not
            continue
        if "first_token_at" in said:
            first_token_at = said["first_token_at"]
        elif "done" in said:
            if progress:
                progress.advance()
        else:
            result = said
    worker.wait()
    return result, first_token_at


def _repeat(directory: Path, task: Task, under: Limits | None, group: MemoryGroup | None) -> list[dict[str, Any]]:
    """What each process reported: a new one each time, as memory and threads lie elsewhere in each."""
    total = task.num_repeats * len(task.prompts)
    with Progress("benchmark requests", total, "requests") as progress:
        return [run_worker(directory, task, under, group, progress) for _ in range(task.num_repeats)]


def _measured(task: Task, repeats: list[Mapping[str, Any]] | list[dict[str, Any]]) -> Outcome:
    facts = {"status": "measured"} | summarize_repeats(repeats, task.noise_threshold)
    facts |= {
        "runtime": repeats[0]["runtime"],
        "num_threads": len(repeats[0]["cpus"]) if task.device_class else task.num_threads,
        "cpu": place.cpu_name(),
    }
    return Outcome(facts, [request for repeat in repeats for request in repeat["requests"]])
