"""`slmops run`: what a user sees of a run on this machine, good or bad."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location("two_steps", Path(__file__).parent / "two_steps.py")
assert _SPEC
assert _SPEC.loader
_two_steps = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_two_steps)


class Bench:
    """A folder with the pipeline, its input and the diary of its steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "runs"
        self.diary, self.rows = folder / "diary", folder / "rows.csv"
        self.pipeline = _two_steps.compile_two_steps(folder)
        self.rows.write_text("a\n")

    def command(self, *arguments: str, how: str | None = "go") -> list[str]:
        settings = [f"--set=rows={self.rows}"] + ([f"--set=how={how}"] if how else [])
        where = ["--output-dir", str(self.output)]
        return [sys.executable, "-m", "slmops.cli", "run", str(self.pipeline), *settings, *where, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"DIARY": str(self.diary)}

    def run(self, *arguments: str, how: str | None = "go") -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments, how=how)
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, cwd=self.folder, env=self.environment
        )

    def start(self) -> subprocess.Popen[str]:
        """A run whose second step sleeps, once that step has begun."""
        command = self.command(how="sleep")
        running = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=self.environment
        )
        _wait_until(lambda: self.ran() == ["first", "second"])
        return running

    def ran(self) -> list[str]:
        """The steps that ran, in order."""
        return self.diary.read_text().split() if self.diary.exists() else []

    def record(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.output / "run.json").read_text())
        return loaded


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_run_says_what_it_did_and_where_the_outputs_are(bench: Bench) -> None:
    ran = bench.run()

    assert ran.returncode == 0, ran.stderr
    record = bench.record()
    assert (record["pipeline"], record["status"]) == ("two-steps", "succeeded")
    assert record["parameters"]["how"] == "go"
    assert list(record["tasks"]) == ["make-rows", "second"]
    assert record["tasks"]["second"]["status"] == "succeeded"
    assert record["tasks"]["second"]["duration_s"] > 0
    assert Path(record["tasks"]["second"]["outputs"]["result"]).read_text() == "a\n"
    assert Path(record["reports"]["make-rows"]).read_text() == "<h1>first</h1>"
    assert str(bench.output / "reports" / "make-rows.html") in ran.stdout


def test_the_steps_own_lines_are_shown_and_no_others(bench: Bench) -> None:
    quiet, verbose = bench.run().stdout, bench.run("--no-cache", "--verbose").stdout
    assert "first has something to say" in quiet
    assert "executor_input" not in quiet
    assert "KFP" not in quiet
    assert "Warning" not in quiet
    assert "executor_input" in verbose


def test_unfinished_work_lies_here_whatever_a_task_sets_for_a_cluster(bench: Bench) -> None:
    assert f"second works in {bench.output / 'work'}" in bench.run().stdout


def test_containers_without_docker_are_refused_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{bench.folder}/nobody.sock")
    ran = bench.run("--runner", "docker")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: Docker does not answer (")
    assert ran.stderr.endswith("; start its daemon, or leave out --runner docker\n")


@pytest.mark.parametrize(("how", "exit_code"), [("DataError", 2), ("GateError", 3), ("StoreUnavailable", 75)])
def test_a_failed_step_gives_the_last_line_and_the_exit_code(bench: Bench, how: str, exit_code: int) -> None:
    ran = bench.run(how=how)

    assert ran.returncode == exit_code
    assert ran.stderr.splitlines()[-1] == "error: second: what is wrong, what was found, what to do"
    assert "Traceback" not in ran.stdout + ran.stderr
    assert bench.record()["status"] == "failed"
    assert bench.record()["tasks"]["second"]["status"] == "failed"
    assert Path(bench.record()["reports"]["make-rows"]).exists(), "reports of earlier steps are there to explain it"


@pytest.mark.parametrize(("how", "reason"), [("crash", "ValueError: a defect"), ("kill", "the system killed it")])
def test_a_step_that_left_no_reason_is_reported_by_its_last_words(bench: Bench, how: str, reason: str) -> None:
    ran = bench.run(how=how)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(f"error: second: {reason}")


def test_a_step_that_is_done_is_not_run_again(bench: Bench) -> None:
    assert bench.run(how="DataError").returncode == 2
    assert bench.run().returncode == 0
    assert bench.ran() == ["first", "second", "second"]

    again = bench.run()
    assert bench.ran() == ["first", "second", "second"]
    assert "taken from the cache" in again.stdout
    record = bench.record()
    assert [task["status"] for task in record["tasks"].values()] == ["cached", "cached"]
    assert Path(record["tasks"]["second"]["outputs"]["result"]).read_text() == "a\n"
    assert Path(record["reports"]["make-rows"]).exists()

    bench.run("--no-cache")
    assert bench.ran()[3:] == ["first", "second"]


def test_a_changed_input_file_is_noticed(bench: Bench) -> None:
    bench.run()
    bench.rows.write_text("b\n")
    bench.run()
    assert bench.ran() == ["first", "second"] * 2
    assert Path(bench.record()["tasks"]["second"]["outputs"]["result"]).read_text() == "b\n"


def test_what_always_runs_and_finds_the_same_leaves_the_steps_behind_it_done(bench: Bench) -> None:
    """A file that only a step without cache reads is no reason to run the others; what it found is."""
    bench.pipeline = _two_steps.compile_looked_up(bench.folder)
    for content, ran in (
        ("a first", ["look_up", "second"]),
        ("a first", ["look_up"]),
        ("a later", ["look_up"]),  # noted in the sidecar, in no file and no figure
        ("b later", ["look_up", "second"]),
        ("a again", ["look_up"]),
    ):
        bench.diary.unlink(missing_ok=True)
        bench.rows.write_text(content)
        done = bench.run(how=None)
        assert done.returncode == 0, done.stderr
        assert bench.ran() == ran, content
        assert Path(bench.record()["tasks"]["second"]["outputs"]["result"]).read_text() == content[0]


def test_goes_on_after_kill_9_and_leaves_no_step_behind(bench: Bench) -> None:
    running = bench.start()
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=20)
    _wait_until(lambda: not _processes_with(str(bench.output)))

    ran = bench.run(how="sleep")

    assert ran.returncode == 0, ran.stderr
    assert bench.ran() == ["first", "second", "second"], "the first step was not run twice, the second from its start"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_steps_too(bench: Bench, how: signal.Signals) -> None:
    running = bench.start()
    running.send_signal(how)
    _, errors = running.communicate(timeout=20)

    assert running.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; the same command goes on from here"
    assert bench.record()["status"] == "interrupted"
    _wait_until(lambda: not _processes_with(str(bench.output)))


def test_two_runs_do_not_share_an_output_directory(bench: Bench) -> None:
    bench.output.mkdir()
    with open(bench.output / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        ran = bench.run()
    assert ran.returncode == 2
    assert "is in use by another run (process 4711); wait for it, or give another --output-dir" in ran.stderr
    assert bench.ran() == []


def _wait_until(condition: Any, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def _processes_with(argument: str) -> list[int]:
    """Processes whose command line contains `argument`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if argument.encode() in command:
                found.append(int(entry.name))
    return found
