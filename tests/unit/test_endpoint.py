"""A teacher behind an endpoint, against a double that answers as the OpenAI chat API does, and fails as it does.

The double is no model: it answers each prompt with the prompt. A real server and the real client meet in tests/e2e.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from slmops.config import TEACHER_API_KEY
from slmops.errors import ConfigError, DataError, TransientError, UserError
from slmops.generate_responses import endpoint
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.generate_responses.run import run
from slmops.records import read_records
from tests.datasets import commands, write_dataset


class Double:
    """What it was asked, and how it answers."""

    def __init__(self) -> None:
        self.url = ""
        self.key = ""
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.failures: list[tuple[int, dict[str, str]]] = []
        """Statuses and headers of the next answers."""
        self.fail_after = 10**9
        """From this many answers on, every answer is a 500."""
        self.finish_reason = "stop"
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def answer(self, body: dict[str, Any], authorization: str) -> tuple[int, dict[str, str], dict[str, Any]]:
        with self.lock:
            if self.key and authorization != f"Bearer {self.key}":
                return 401, {}, {"error": {"message": "wrong key"}}
            if self.failures:
                return *self.failures.pop(), {"error": {"message": "refused"}}
            if sum(self.asked.values()) >= self.fail_after:
                return 500, {}, {"error": {"message": "broken"}}
            prompt = body["messages"][-1]["content"]
            self.asked[prompt] += 1
            self.bodies.append(body)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": f"{prompt.upper()}\u2028"},
            "finish_reason": self.finish_reason,
        }
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        completion = {"id": "1", "object": "chat.completion", "created": 1, "model": "teacher-v3", "choices": [choice]}
        return 200, {}, completion | {"usage": usage}


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    monkeypatch.delenv(TEACHER_API_KEY, raising=False)
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 2)
    double = Double()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with double.lock:
                double.in_flight += 1
                double.most_in_flight = max(double.most_in_flight, double.in_flight)
            time.sleep(0.01)
            status, headers, content = double.answer(body, self.headers.get("Authorization", ""))
            with double.lock:
                double.in_flight -= 1
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    double.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield double
    server.shutdown()
    server.server_close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "prompts", commands(24, seed=5))


def _config(double: Double, **settings: Any) -> GenerateResponsesConfig:
    return GenerateResponsesConfig.create(
        {"teacher_kind": "endpoint", "endpoint_url": double.url, "endpoint_model": "big", "batch_size": 4} | settings
    )


def test_each_prompt_is_asked_once_and_answered_in_order(double: Double, prompts: Path, tmp_path: Path) -> None:
    sidecar = run(_config(double), prompts=prompts, teacher=None, responses=tmp_path / "responses")
    asked = [record.messages[-2].content for record in read_records(prompts)]
    assert [record.completion for record in read_records(tmp_path / "responses")] == [
        f"{text.upper()}\u2028" for text in asked
    ]
    assert double.asked == Counter(asked)
    assert 1 < double.most_in_flight <= 4
    assert (sidecar.facts["num_rows"], sidecar.facts["teacher"], sidecar.facts["num_tokens"]) == (24, "teacher-v3", 120)
    assert {(body["model"], body["temperature"]) for body in double.bodies} == {("big", 0.0)}


def test_sampling_says_so_to_the_endpoint(double: Double, prompts: Path, tmp_path: Path) -> None:
    config = _config(double, decoding="sample", temperature=0.7, top_p=0.9, seed=100, max_rows=3, max_new_tokens=77)
    run(config, prompts=prompts, teacher=None, responses=tmp_path / "responses")
    sent = [(b["temperature"], b["top_p"], b["max_completion_tokens"]) for b in double.bodies]
    assert sent == [(0.7, 0.9, 77)] * 3
    assert {body["seed"] for body in double.bodies} == {100, 101, 102}


def test_a_busy_endpoint_is_asked_again(double: Double, prompts: Path, tmp_path: Path) -> None:
    double.failures = [(429, {"Retry-After": "0"}), (500, {}), (429, {"Retry-After": "0"})]
    sidecar = run(_config(double), prompts=prompts, teacher=None, responses=tmp_path / "responses")
    assert sidecar.facts["num_rows"] == 24


def test_what_was_answered_before_a_failure_is_not_asked_again(
    double: Double, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 0)
    double.fail_after = 10
    with pytest.raises(TransientError, match="has no answer now"):
        run(_config(double), prompts=prompts, teacher=None, responses=tmp_path / "responses")
    assert not (tmp_path / "responses").exists()
    kept = next(tmp_path.glob("*.work")) / "answers.jsonl"
    kept.write_text(kept.read_text() + '{"index": 20, "te')  # as a kill in the middle of a line leaves it
    double.fail_after = 10**9
    sidecar = run(_config(double), prompts=prompts, teacher=None, responses=tmp_path / "responses")
    assert sidecar.facts["num_rows"] == 24
    assert set(double.asked.values()) == {1}


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(
    double: Double, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    double.key = "sk-secret"
    with pytest.raises(UserError, match=rf"refuses the key \(401\).*\${TEACHER_API_KEY}"):
        run(_config(double), prompts=prompts, teacher=None, responses=tmp_path / "responses")
    monkeypatch.setenv(TEACHER_API_KEY, "sk-secret")
    caplog.set_level("DEBUG", "slmops")
    run(_config(double), prompts=prompts, teacher=None, responses=tmp_path / "responses")
    written = "".join(path.read_text() for path in (tmp_path / "responses").rglob("*") if path.is_file())
    assert "sk-secret" not in written + caplog.text


def test_cut_answers_are_left_out_and_counted(double: Double, prompts: Path, tmp_path: Path) -> None:
    double.finish_reason = "length"
    with pytest.raises(DataError, match=r"num_truncated 24.*raise max_new_tokens"):
        run(_config(double), prompts=prompts, teacher=None, responses=tmp_path / "responses")


def test_an_absent_endpoint_may_be_tried_again(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_RETRIES", 0)
    config = GenerateResponsesConfig(teacher_kind="endpoint", endpoint_url="http://127.0.0.1:9/v1")
    with pytest.raises(TransientError, match=r"http://127\.0\.0\.1:9/v1 \(default\) does not answer"):
        run(config, prompts=prompts, teacher=None, responses=tmp_path / "responses")


def test_settings_that_contradict_each_other_are_refused(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a teacher"):
        run(GenerateResponsesConfig(), prompts=prompts, teacher=None, responses=tmp_path / "responses")
    with pytest.raises(ConfigError, match="an endpoint gives text"):
        GenerateResponsesConfig.create({"teacher_kind": "endpoint", "logits_top_k": 8})
