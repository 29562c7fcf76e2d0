"""The demo with a tiny model: real S3 server, real pipeline, real node, the public client; killed, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slmops import artifacts
from slmops.errors import GateError
from slmops.publish.config import PublishConfig
from slmops.publish.run import run as publish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def demo(work_dir: Path) -> list[str]:
    return [sys.executable, "-m", "slmops.demo", "--profile", "smoke", "--work-dir", str(work_dir)]


def processes_below(work_dir: Path) -> list[str]:
    """Command lines of running processes that name `work_dir`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(work_dir) in command and entry.parent.name != str(os.getpid()):
            found.append(command)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The work directory and the output of a demo that was killed in its third step, and started again."""
    work_dir = tmp_path_factory.mktemp("demo")
    artifact_dir = work_dir / "smoke" / "run" / "artifacts"
    first = subprocess.Popen(demo(work_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(artifact_dir.glob("*/generate-responses")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert first.poll() is None, "the demo ended before it could be killed"
    first.send_signal(signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + 20
    while processes_below(work_dir) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_below(work_dir) == [], "what a killed demo started ends with it"
    second = subprocess.run(demo(work_dir), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert second.returncode == 0, second.stdout[-4000:]
    return work_dir / "smoke", second.stdout


def test_it_goes_on_where_it_was_killed(finished: tuple[Path, str]) -> None:
    tasks = json.loads((finished[0] / "run" / "run.json").read_text())["tasks"]
    assert tasks["finetune-teacher"]["status"] == "cached"
    assert tasks["publish"]["status"] == "succeeded"


def test_the_served_model_answers_the_public_client(finished: tuple[Path, str]) -> None:
    """A tiny model's answers need not be right, but they come from the release that the node pulled."""
    work_dir, output = finished
    answers = [line for line in output.splitlines() if line.startswith("     → ")]
    assert len(answers) == 3
    assert all(line.endswith("  right") or "  WRONG, not {" in line for line in answers)
    release = json.loads((work_dir / "run" / "run.json").read_text())["tasks"]["publish"]["outputs"]["release"]
    digest = artifacts.read(Path(release)).facts["release_digest"]
    assert (work_dir / "node" / "current").resolve().name == digest


def test_it_prints_its_figures_and_where_the_report_is_and_leaves_nothing_running(finished: tuple[Path, str]) -> None:
    work_dir, output = finished
    for figure in ("time per response, median: ", "peak memory: ", "size on disk: ", "accuracy: "):
        assert figure in output
    assert "of it are the runtime's floor" in output
    report = Path(output.rsplit("report: ", 1)[1].strip())
    page = report.read_text()
    for step in ("prepare_data", "finetune", "generate_responses", "distill", "quantize"):
        assert step in page
    assert processes_below(work_dir) == []


def test_a_verdict_for_another_variant_publishes_nothing(
    finished: tuple[Path, str], tiny_variants: Path, tmp_path: Path
) -> None:
    tasks = json.loads((finished[0] / "run" / "run.json").read_text())["tasks"]
    verdict = Path(tasks["gate"]["outputs"]["verdict"])
    with pytest.raises(GateError):
        publish(
            PublishConfig(store_uri=str(tmp_path / "store")),
            variants=tiny_variants,
            verdict=verdict,
            release=tmp_path / "release",
        )
    assert not list(tmp_path.rglob("*.json")), "nothing was published"
