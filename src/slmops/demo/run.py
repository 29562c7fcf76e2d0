"""The demo: from a real base model to an answer at the edge, by the commands that a user would type."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops import artifacts
from slmops.demo import building_commands, processes
from slmops.demo.building_commands import Command
from slmops.demo.models import fetch_smollm2, make_tiny_model
from slmops.demo.object_store import object_store
from slmops.errors import SlmopsError, TransientError
from slmops.evaluate.matches import same_json
from slmops.gate.config import RAW_MEMORY_GOAL, GateConfig
from slmops.progress import set_up_logging

CHANNEL = "demo"
SYSTEM_PROMPT = "Building devices."
REQUESTS = {
    "could you dim the lights in the kitchen to 30 percent please": Command("light", "kitchen", "set", 30).json(),
    "unlock the garage door, no wait, lock it": Command("door", "garage", "lock").json(),
    "what's the weather like in Lisbon?": building_commands.NO_COMMAND,
}
"""What the served model is asked, and the right answer."""
SERVER_TIMEOUT_S = 60.0


GOALS = GateConfig()
"""What the demo sets out to show: what a gate asks for unless told otherwise. The demo's own gate asks for less."""


@dataclass(frozen=True)
class Profile:
    """One size of the demo."""

    recipe: str
    num_rows: int
    real_model: bool


PROFILES = {
    "full": Profile(recipe="demo", num_rows=6000, real_model=True),
    "smoke": Profile(recipe="smoke", num_rows=1500, real_model=False),
}


def run(profile_name: str, work_dir: Path) -> None:
    """Run everything below `work_dir`; a run that was killed goes on where it was.

    Raises:
        SlmopsError: a part failed; what it said is on the screen.
    """
    set_up_logging()
    started = time.monotonic()
    profile = PROFILES[profile_name]
    work_dir = work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    _say("1", "a base model and a data set")
    base = fetch_smollm2(work_dir.parent / "models") if profile.real_model else make_tiny_model(work_dir / "tiny")
    rows = building_commands.write(work_dir / "building_commands.jsonl", num_rows=profile.num_rows)
    print(f"   base model {base}\n   data set   {rows}")
    with object_store(work_dir / "object-store") as store:
        environment = os.environ | store.environment()
        uri = f"{store.make_bucket('releases')}/models"
        _say("2", f"the pipeline, on this machine, with the object store at {store.endpoint_url}")
        settings = {
            "data_uri": rows,
            "base_model_uri": base,
            "store_uri": uri,
            "channel": CHANNEL,
            "prompt_template": "{request}",
            "completion_template": "{command}",
            "system_prompt": SYSTEM_PROMPT,
        }
        _slmops(
            ["run", "distill_to_edge", "--recipe", profile.recipe, "--output-dir", str(work_dir / "run")]
            + [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")],
            environment,
        )
        _say("3", "an edge node pulls the release")
        node = work_dir / "node"
        _slmops(["edge", "pull", "--store", uri, "--channel", CHANNEL, "--root", str(node)], environment)
    _say("4", "the edge node serves it, without the object store, and the public openai client asks")
    with _serving(node) as base_url:
        for request, expected in REQUESTS.items():
            answer = _ask(base_url, request)
            print(
                f"   {request}\n     → {answer}  {'right' if same_json(answer, expected) else f'WRONG, not {expected}'}"
            )
    _say("5", "what came out: the int4 student beside the teacher in full precision, on this machine, in this run")
    record = json.loads((work_dir / "run" / "run.json").read_text())
    for line in headline(record["tasks"]):
        print(f"   {line}")
    print(f"   took {time.monotonic() - started:.0f} s")
    print(f"   report: {record['reports']['gate']}")


def headline(tasks: Mapping[str, Any]) -> Iterator[str]:
    """What each device class gets; then the figures that the demo is about, each beside its goal, met or missed.

    Args:
        tasks: by display name, with the paths of their outputs, as `slmops run` records them.
    """

    def facts(task: str) -> dict[str, Any]:
        kind = task.partition("-")[0]
        output = {"evaluate": "evaluation", "benchmark": "benchmark", "gate": "verdict"}[kind]
        return artifacts.read(Path(tasks[task]["outputs"][output])).facts

    verdict = facts("gate")
    chosen = verdict["variant"]
    for choice in verdict["choices"]:
        yield f"{choice['device_class']:<17} {choice['variant'] or 'nothing'}: {choice['reason']}"
    teacher, candidate = facts("benchmark-teacher"), facts(f"benchmark-{chosen}")
    taught, learned = facts("evaluate-teacher"), facts(f"evaluate-{chosen}")
    floor, peak = candidate["runtime_floor_bytes"], teacher["peak_rss_bytes"]
    yield _figure(
        "time per response, median",
        f"{candidate['latency_ms_p50']:.0f} ms, teacher {teacher['latency_ms_p50']:.0f} ms",
        1 - candidate["latency_ms_p50"] / teacher["latency_ms_p50"],
        GOALS.min_latency_saved,
    )
    yield _figure(
        "peak memory",
        f"{candidate['peak_rss_bytes'] / 1e6:.0f} MB, teacher {peak / 1e6:.0f} MB",
        1 - candidate["peak_rss_bytes"] / peak,
        RAW_MEMORY_GOAL,
    )
    yield (
        f"    {floor / 1e6:.0f} MB of it are the runtime's floor, {floor / peak:.1%} of the teacher's peak; "
        f"above the floor {1 - (candidate['peak_rss_bytes'] - floor) / peak:.1%} less"
    )
    yield _figure(
        "size on disk",
        f"{candidate['size_bytes'] / 1e6:.1f} MB, student in full precision "
        f"{facts('benchmark-student')['size_bytes'] / 1e6:.1f} MB",
        1 - candidate["size_bytes"] / facts("benchmark-student")["size_bytes"],
        GOALS.min_size_saved,
    )
    kept = learned["accuracy"] / taught["accuracy"]
    yield (
        f"{'met' if kept >= GOALS.min_accuracy_kept else 'MISSED':<7} accuracy: {learned['accuracy']:.3f} "
        f"({learned['accuracy_low']:.3f} to {learned['accuracy_high']:.3f}), teacher {taught['accuracy']:.3f}: "
        f"{kept:.1%} kept, goal {GOALS.min_accuracy_kept:.0%}"
    )


def _figure(name: str, what: str, saved: float, goal: float) -> str:
    return f"{'met' if saved >= goal else 'MISSED':<7} {name}: {what}: {saved:.1%} less, goal {goal:.0%} less"


def _say(number: str, what: str) -> None:
    print(f"\n\033[1m{number}. {what}\033[0m" if sys.stdout.isatty() else f"\n{number}. {what}", flush=True)


def _slmops(arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Run a command of slmops, shown as a user would type it.

    Raises:
        SlmopsError: it failed; it has said why.
    """
    print(f"   $ slmops {shlex.join(arguments)}", flush=True)
    process = processes.start([sys.executable, "-m", "slmops.cli", *arguments], env=environment)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code != 0:
        error = SlmopsError(f"`slmops {arguments[0]}` ended with code {code}; the reason is above")
        error.exit_code = code
        raise error


@contextmanager
def _serving(node: Path) -> Iterator[str]:
    """Serve the node's current release on a free port; yield its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["edge", "serve", "--root", str(node), "--port", str(port)]
    print(f"   $ slmops {shlex.join(arguments)}", flush=True)
    log_path = node.parent / "serve.log"
    with open(log_path, "w") as server_log:
        server = processes.start(
            [sys.executable, "-m", "slmops.cli", *arguments], stdout=server_log, stderr=subprocess.STDOUT
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/healthz", server, log_path)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + SERVER_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - our own server on loopback
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise TransientError(f"the server did not start; read {log_path}")


def _ask(base_url: str, request: str) -> str:
    """One answer of the served model, by the public client."""
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key="not-needed")
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": request}],
        max_tokens=48,
        temperature=0,
    )
    return answer.choices[0].message.content or ""
