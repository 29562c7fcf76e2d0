"""lm_evaluate with a served model: our own edge server, a server as vLLM is, and one that misbehaves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.config import TEACHER_API_KEY
from slmops.edge.pull import pull
from slmops.errors import ConfigError, SlmopsError, TransientError, UserError
from slmops.publish.config import PublishConfig
from slmops.publish.run import run as publish
from tests.judged import write_verdict
from tests.lm_evaluate.lm_tasks import (
    TASKS,
    Plain,
    answers,
    expected,
    lm_evaluate,
    rows_of,
    write_task,
)
from tests.teachers import misbehaving
from tests.teachers.misbehaving import Server


@pytest.fixture
def served_teacher(teacher_variants: Path, tmp_path: Path) -> Iterator[str]:
    """The address of an edge server, a process of its own, that answers with it."""
    base, store, node = tmp_path / "served", str(tmp_path / "served" / "store"), tmp_path / "served" / "node"
    verdict = write_verdict(base / "verdict", artifacts.expect(teacher_variants, "variants"))
    publish(PublishConfig(store_uri=store), variants=teacher_variants, verdict=verdict, release=base / "release")
    pull(store, "default", node)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "slmops.cli", "edge", "serve", f"--root={node}", f"--port={port}"]
    with subprocess.Popen([*command, "--max-queue=64"], env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/healthz", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server was not ready after 60 s"
        try:
            httpx.get(url, timeout=5)
            return
        except httpx.TransportError:
            time.sleep(0.1)


@pytest.fixture
def server() -> Iterator[Server]:
    with misbehaving.serving() as server:
        yield server


def ask(server: Server, tmp_path: Path, task_files: Path, *tasks: str, **settings: Any) -> Sidecar:
    endpoint = {"target": "endpoint", "endpoint_url": server.url, "max_retries": 1}
    return lm_evaluate(tmp_path, None, task_files, *tasks, **(endpoint | settings))


@contextmanager
def completions(plain: Plain) -> Iterator[str]:
    """A server as vLLM is: completions with `echo` and `logprobs`, here by transformers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say({"data": [{"id": "teacher"}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._say({"choices": [completion(plain, asked)]})

        def _say(self, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/v1"
        listening.shutdown()


@torch.inference_mode()
def completion(plain: Plain, asked: dict[str, Any]) -> dict[str, Any]:
    prompt = asked["prompt"][0] if isinstance(asked["prompt"], list) else asked["prompt"]
    ids = plain.encode(prompt) if isinstance(prompt, str) else prompt
    if not asked.get("echo"):
        text = plain.answer(prompt if isinstance(prompt, str) else plain.decode(ids))
        return {"index": 0, "text": text}
    log_probs = plain.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    given = [float(log_probs[at, token]) for at, token in enumerate(ids[1:])]
    best = [{"x": float(row.max())} for row in log_probs]
    return {"index": 0, "logprobs": {"token_logprobs": [None, *given, best[-1]["x"]], "top_logprobs": [None, *best]}}


@pytest.mark.slow
def test_a_served_model_answers_as_the_variant_that_is_served(
    served_teacher: str, teacher_variants: Path, task_files: Path, tmp_path: Path
) -> None:
    chat = {"variant": "cpu-int4", "apply_chat_template": True}
    here = lm_evaluate(tmp_path, teacher_variants, task_files, "talk", **chat)
    said_here = answers(tmp_path, "talk")
    there = lm_evaluate(tmp_path, None, task_files, "talk", target="endpoint", endpoint_url=served_teacher)
    assert answers(tmp_path, "talk") == said_here
    assert there.facts["talk_exact_match"] == here.facts["talk_exact_match"] > 0.6
    assert there.facts["runtime"] == "chat completions of slmops"


@pytest.mark.slow
def test_a_server_with_log_probabilities_gives_the_figures_of_its_model(
    tiny_teacher: Path, held_out_rows: Path, task_files: Path, tmp_path: Path
) -> None:
    plain = Plain(tiny_teacher)
    with completions(plain) as url:
        sidecar = lm_evaluate(
            tmp_path,
            None,
            task_files,
            "choose",
            "answer",
            "read",
            target="endpoint",
            endpoint_url=url,
            endpoint_api="completions",
            endpoint_tokenizer=str(tiny_teacher),
        )
    figures = expected(plain, rows_of(held_out_rows))
    assert {name: sidecar.facts[name] for name in figures} == pytest.approx(figures, rel=1e-4)


def test_log_probabilities_of_a_chat_api_are_refused_before_anything_is_asked(
    server: Server, task_files: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="choose, read: log-probabilities are wanted, and the chat API gives none"):
        ask(server, tmp_path, task_files, "choose", "read", "talk")
    assert not server.headers


def test_a_server_without_log_probabilities_is_found_out_by_one_request(
    server: Server, task_files: Path, tmp_path: Path
) -> None:
    server.always = lambda _: misbehaving.Reply(payload={"choices": [{"index": 0, "text": "a", "logprobs": None}]})
    with pytest.raises(ConfigError, match="choose: log-probabilities are wanted, and this one gave none"):
        ask(server, tmp_path, task_files, "choose", endpoint_api="completions")
    assert sum(server.asked.values()) == 1


def test_an_endpoint_that_is_not_there_is_named(task_files: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    with pytest.raises(TransientError, match="does not answer: no connection"):
        lm_evaluate(tmp_path, None, task_files, "talk", target="endpoint", endpoint_url=url)


@pytest.mark.parametrize(
    ("reply", "error", "said"),
    [
        (misbehaving.error(400, "stop is not allowed"), UserError, "refuses what a task asks .*stop is not allowed"),
        (misbehaving.error(404, "unknown model"), UserError, "no such model or address .*unknown model"),
        (misbehaving.error(500), TransientError, "does not answer now"),
        (misbehaving.HTML, TransientError, "gave no answer"),
        (misbehaving.RESET, TransientError, "stopped answering"),
    ],
)
def test_an_endpoint_that_fails_ends_the_step_with_its_words(
    reply: misbehaving.Reply, error: type[SlmopsError], said: str, server: Server, task_files: Path, tmp_path: Path
) -> None:
    server.always = lambda _: reply
    with pytest.raises(error, match=said):
        ask(server, tmp_path, task_files, "talk", max_rows=1, max_retries=0)


def test_a_refusal_is_not_repeated_and_a_failure_is(server: Server, task_files: Path, tmp_path: Path) -> None:
    server.always = lambda _: misbehaving.error(400)
    with pytest.raises(UserError):
        ask(server, tmp_path, task_files, "talk", max_rows=1, max_retries=3)
    assert len(server.bodies) == 1
    server.always = lambda _: misbehaving.error(503) if len(server.bodies) < 3 else None
    ask(server, tmp_path, task_files, "talk", max_rows=1, max_retries=3)
    assert len(server.bodies) == 3


def test_the_key_goes_to_the_endpoint_and_no_other_key_does(
    server: Server, task_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-service")
    ask(server, tmp_path, task_files, "talk", max_rows=1)
    assert not any("authorization" in headers for headers in server.headers)
    server.key = "secret"
    with pytest.raises(UserError, match="wants a key"):
        ask(server, tmp_path, task_files, "talk", max_rows=1)
    monkeypatch.setenv(TEACHER_API_KEY, "secret")
    ask(server, tmp_path, task_files, "talk", max_rows=1)
    assert "secret" not in (tmp_path / "lm_evaluation" / artifacts.SIDECAR).read_text()


def test_text_ends_at_every_stop_string_though_a_server_takes_four(
    server: Server, task_files: Path, tmp_path: Path
) -> None:
    until = ["1", "2", "3", "4", "TURN", "ON", "OFF"]
    write_task(task_files, "talk", TASKS["talk"] | {"generation_kwargs": {"until": until, "do_sample": False}})
    ask(server, tmp_path, task_files, "talk", max_rows=2)
    assert answers(tmp_path, "talk") == ["", ""], "the server says the prompt in capitals: TURN …"
    assert server.bodies[0]["stop"] == until[:4]
