"""Runs a compiled pipeline on this machine, a process or a container per step; goes on where a killed run stopped."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

import slmops
from slmops.errors import GateError, SlmopsError, TransientError, UserError, explain_os_errors
from slmops.kubeflow import containers
from slmops.kubeflow.compile import Compiled
from slmops.kubeflow.local_cache import keyed_by_content
from slmops.kubeflow.local_output import StepLines, TaskEvents, TaskRun
from slmops.resume import WORK_DIR
from slmops.step import RUNNER_PID, TERMINATION_LOG

Runner = Literal["process", "docker"]

RUN_FILE = "run.json"
NO_STEP_CODE = {"cli.py", "demo", "doctor.py", "edge", "kubeflow"}
"""Parts of the package that no step imports, so that a change there leaves the steps' results valid."""

_EXIT_CODE = re.compile(r"\nexit code (\d+)\s*$")
_ERRORS: dict[int, type[SlmopsError]] = {
    error.exit_code: error for error in (UserError, GateError, TransientError, SlmopsError)
}


def run(
    compiled: Compiled,
    arguments: Mapping[str, Any],
    *,
    output_dir: Path,
    use_cache: bool,
    verbose: bool,
    runner: Runner = "process",
) -> None:
    """Run the pipeline; everything it writes is below `output_dir`.

        artifacts/    outputs of the steps      cache/        which of them can be used again
        reports/      HTML outputs by task      work/         unfinished work of killed steps
        run.json      what ran, how long, and where its outputs are

    Raises:
        SlmopsError: a step failed; the message and the exit code are that step's.
    """
    output_dir = output_dir.resolve()
    code = containers.image_ids(compiled) if runner == "docker" else _code_of_steps()
    with explain_os_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    with _locked(output_dir), _terminated_as_interrupted():
        (output_dir / RUN_FILE).unlink(missing_ok=True)
        if not use_cache:
            for unfinished in (output_dir / "work").glob("*.work"):  # teachers' answers stay: they may have been paid
                shutil.rmtree(unfinished, ignore_errors=True)
        termination_log = output_dir / "termination-log"
        termination_log.unlink(missing_ok=True)
        lines = StepLines(sys.stdout)
        events = TaskEvents(compiled, sys.stdout, lambda: termination_log.unlink(missing_ok=True), verbose)
        started = time.monotonic()
        status = "interrupted"
        try:
            with _environment(output_dir, termination_log), _listening(events, None if verbose else lines):
                cache = output_dir / "cache" / cache_key(compiled, arguments, code) if use_cache else None
                with _kfp_runner(runner, compiled, arguments, output_dir, termination_log) as kfp_runner:
                    status = _execute(compiled, arguments, events, output_dir, kfp_runner, cache)
        finally:
            _find_outputs(compiled.name, events.runs, output_dir)
            reports = _copy_reports(compiled, events.runs, output_dir)
            _write_record(output_dir, compiled, arguments, events.runs, reports, status, time.monotonic() - started)
        _print_summary(events.runs, reports, output_dir)
        if events.failed:
            raise _error_of(events.failed, termination_log, lines.last)


def _execute(
    compiled: Compiled,
    arguments: Mapping[str, Any],
    events: TaskEvents,
    output_dir: Path,
    runner: Any,
    cache: Path | None,
) -> str:
    from kfp import components, local

    local.init(
        runner=runner,
        pipeline_root=str(output_dir / "artifacts"),
        workspace_root=str(output_dir / "workspace"),
        enable_caching=cache is not None,
        cache_root=str(cache) if cache else None,
    )
    pipeline = components.load_component_from_text(_for_this_machine(compiled))
    try:
        with keyed_by_content():
            pipeline(**arguments)
    except RuntimeError:
        if events.failed is None:
            raise
        return "failed"
    return "succeeded"


def _for_this_machine(compiled: Compiled) -> str:
    """The pipeline without what its tasks set for a cluster and a run on this machine sets itself."""
    spec = copy.deepcopy(compiled.spec)
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor.get("container", {})
        container["env"] = [entry for entry in container.get("env", ()) if entry["name"] != WORK_DIR]
    return yaml.safe_dump(spec)


def _kfp_runner(
    runner: Runner, compiled: Compiled, arguments: Mapping[str, Any], output_dir: Path, termination_log: Path
) -> AbstractContextManager[Any]:
    if runner == "docker":
        folders = [output_dir / name for name in ("artifacts", "work", "workspace")]
        named = {**arguments, **compiled.sources_of_recipe()}
        return containers.docker_runner(named, output_dir=output_dir, folders=folders, termination_log=termination_log)
    from kfp import local

    return nullcontext(local.SubprocessRunner(use_venv=False))


def cache_key(compiled: Compiled, arguments: Mapping[str, Any], code: Mapping[str, str]) -> str:
    """What KFP's own cache key does not see: the code of the steps, and the local files that they are pointed to."""
    facts: list[object] = [sorted(code.items())]
    read = {name: arguments.get(name) for name in compiled.cached_inputs()} | compiled.sources_of_recipe()
    for name, uri in sorted(read.items()):
        path = Path(str(uri)).absolute()
        if uri and path.exists():
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            facts += [(name, str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _code_of_steps() -> dict[str, str]:
    """Digests of the modules of this package that steps run."""
    package = Path(slmops.__file__).parent
    sources = [p for p in sorted(package.rglob("*.py")) if p.relative_to(package).parts[0] not in NO_STEP_CODE]
    return {str(p.relative_to(package)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sources}


@contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of `output_dir`; the lock goes with the process, however it ends."""
    path = output_dir / ".lock"
    with explain_os_errors(path), open(path, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{output_dir} is in use by another run (process {lock.read() or 'unknown'}); "
                "wait for it, or give another --output-dir"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that the run is recorded and its steps end."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _environment(output_dir: Path, termination_log: Path) -> Iterator[None]:
    """What the steps' processes inherit."""
    values = {
        WORK_DIR: str(output_dir / "work"),
        TERMINATION_LOG: str(termination_log),
        RUNNER_PID: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
    }
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _listening(events: TaskEvents, lines: StepLines | None) -> Iterator[None]:
    """Hear KFP's log records, and print the steps' lines alone if `lines` is given."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    root.addFilter(events)
    try:
        with redirect_stdout(lines) if lines else nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You may be attemping to run a task that uses custom")
            warnings.filterwarnings("ignore", message="Task .*: settings .* have no effect")
            yield
    finally:
        root.removeFilter(events)
        root.setLevel(level)


def _find_outputs(pipeline: str, runs: list[TaskRun], output_dir: Path) -> None:
    """Fill in where each task's outputs are: KFP leaves that beside them, and in its cache."""
    for run in runs:
        if run.status == "cached":
            entry = next((output_dir / "cache").glob(f"*/{run.cache_key}*.json"))
            outputs = json.loads(entry.read_text())
            run.outputs = {name: value["uri"] for name, value in outputs.items() if isinstance(value, dict)}
        place = run.component if run.round is None else f"*-iteration-{run.round}/{run.component}"
        found = sorted((output_dir / "artifacts").glob(f"{pipeline}-[0-9]*/{place}/executor_output.json"))
        if run.status == "succeeded" and found:
            artifacts = json.loads(found[-1].read_text()).get("artifacts", {})
            run.outputs = {name: value["artifacts"][0]["uri"] for name, value in artifacts.items()}


def _copy_reports(compiled: Compiled, runs: list[TaskRun], output_dir: Path) -> dict[str, str]:
    """Copy the HTML outputs to names that stay the same from run to run and that a browser knows what to do with."""
    pages = compiled.outputs_of_type("system.HTML")
    reports = {}
    for run in runs:
        for name, path in run.outputs.items():
            if (run.component, name) in pages and Path(path).is_file():
                target = output_dir / "reports" / f"{run.display_name}.html"
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
                reports[run.display_name] = str(target)
    return reports


def _write_record(
    output_dir: Path,
    compiled: Compiled,
    arguments: Mapping[str, Any],
    runs: list[TaskRun],
    reports: dict[str, str],
    status: str,
    duration_s: float,
) -> None:
    tasks = {run.display_name: {k: asdict(run)[k] for k in ("status", "duration_s", "outputs")} for run in runs}
    record = {
        "pipeline": compiled.name,
        "status": status,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_s": round(duration_s, 3),
        "parameters": dict(arguments),
        "tasks": tasks,
        "reports": reports,
    }
    partial = output_dir / f"{RUN_FILE}.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(output_dir / RUN_FILE)


def _print_summary(runs: list[TaskRun], reports: dict[str, str], output_dir: Path) -> None:
    width = max((len(run.display_name) for run in runs), default=0)
    print()
    for run in runs:
        took = "cached" if run.status == "cached" else f"{run.duration_s:.1f} s"
        print(f"  {run.display_name:<{width}}  {took:>9}  {'' if run.status == 'cached' else run.status}".rstrip())
    for name, path in reports.items():
        print(f"report of {name}: {path}")
    print(f"all outputs: {output_dir / RUN_FILE}", flush=True)


def _error_of(failed: TaskRun, termination_log: Path, last_line: str) -> SlmopsError:
    """The failing step's own reason and exit code; for a step that left none, its last words."""
    text = termination_log.read_text() if termination_log.exists() else ""
    if match := _EXIT_CODE.search(text):
        reason = text[: match.start()].partition(": ")[2]
        return _ERRORS.get(int(match[1]), SlmopsError)(f"{failed.display_name}: {reason}")
    if last_line.endswith("Killed"):
        last_line = "the system killed it, most often because memory ran out; use smaller batches or a smaller model"
    return SlmopsError(f"{failed.display_name}: {last_line or 'it failed without a word'}")
