"""The server as its clients see it: a process of its own, asked by the real `openai` client."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from slmops.edge import node
from slmops.edge.serve import serve
from slmops.errors import ArtifactError, ConfigError

pytestmark = pytest.mark.slow

QUESTION: list[Any] = [{"role": "user", "content": "turn on the lamp in the kitchen"}]

SERVER = """
import sys, time
from pathlib import Path
from slmops.edge import engine, serve
root, port, key_file, pause_s, queue, batched = sys.argv[1:]
if not int(batched):
    serve.open_engine = lambda directory, _: engine.GeneratorEngine(directory)
generate = engine.Engine.generate
def slowly(self, tokens, request, send, cancelled):
    def paced(piece):
        send(piece)
        time.sleep(float(pause_s))
    return generate(self, tokens, request, paced, cancelled)
engine.Engine.generate = slowly
key_path = Path(key_file) if key_file else None
serve.serve(Path(root), "127.0.0.1", int(port), key_path, max_concurrency=2, max_queue=int(queue))
"""
# The tiny model answers faster than a test can hang up, so a pause per token stands in for a larger one.


@contextmanager
def running(
    root: Path, key_file: Path | str = "", pause_s: float = 0.0, queue: int = 16, batched: bool = True
) -> Iterator[tuple[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            SERVER,
            str(root),
            str(port),
            str(key_file),
            str(pause_s),
            str(queue),
            str(int(batched)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server was not ready after 60 s"
            try:
                httpx.get(f"{url}/healthz", timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module", params=[True, False], ids=["one batch", "a generator each"])
def url(request: pytest.FixtureRequest, tiny_node: Path) -> Iterator[str]:
    with running(tiny_node, batched=request.param) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with client_of(url) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    create: Any = client.chat.completions.create
    return create(**({"model": "slmops", "messages": QUESTION, "max_tokens": 24} | fields))


def test_an_answer_with_usage(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=10)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens == 10 or choice.finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 4


def test_a_stop_string_is_not_part_of_the_answer(client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    answer = ask(client, stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_the_default_is_repeatable_and_a_seed_makes_sampling_so(client: openai.OpenAI) -> None:
    assert ask(client).choices == ask(client).choices
    assert ask(client).choices == ask(client, temperature=0).choices
    warm = [ask(client, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_requests_at_once_get_their_own_answers(client: openai.OpenAI) -> None:
    questions = [[{"role": "user", "content": f"set room {n} to {n} degrees"}] for n in range(6)]
    alone = [ask(client, messages=question).choices for question in questions]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda q: ask(client, messages=q).choices, questions)) == alone


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-4o"}, 404, "model"),
        ({"temperature": 9}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "lamp " * 3000}]}, 400, "messages"),
        ({"n": 3}, 400, "n"),
        ({"extra_body": {"unknown_field": 1}}, 400, "unknown_field"),
        ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, 413, None),
    ],
)
def test_errors_have_openai_s_shape(client: openai.OpenAI, fields: dict[str, Any], status: int, param: Any) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **fields)
    assert caught.value.status_code == status
    assert caught.value.body["message"]  # type: ignore[index]
    assert caught.value.body["param"] == param  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{not json", 400),
        ("/v1/chat/completions", b"[" * 100_000, 400),
        ("/v1/chat/completions", b"\xff\xfe", 400),
        ("/v1/chat/completions", None, 405),
        ("/v1/nothing", None, 404),
    ],
)
def test_whatever_comes_the_answer_is_json(url: str, path: str, body: bytes | None, status: int) -> None:
    answer = httpx.post(url + path, content=body) if body is not None else httpx.get(url + path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_models_and_health(client: openai.OpenAI, url: str, tiny_node: Path) -> None:
    assert [model.id for model in client.models.list()] == ["slmops"]
    health = httpx.get(f"{url}/healthz").json()
    assert health == {"status": "ok", "release_digest": node.current_digest(tiny_node), "variant": "cpu-int4"}


def test_without_the_key_only_health_answers(tiny_node: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("open-sesame\n")
    with running(tiny_node, key_file) as (url, _):
        with client_of(url, "wrong") as client:
            for call in (client.models.list, lambda: ask(client)):
                with pytest.raises(openai.AuthenticationError):
                    call()
        with client_of(url, "open-sesame") as client:
            assert ask(client).choices


def test_a_full_queue_refuses_and_a_client_that_leaves_makes_room(tiny_node: Path) -> None:
    with running(tiny_node, pause_s=0.1, queue=0) as (url, _), client_of(url) as client:
        # Sampled, so that it does not end early; without a hang-up each of these takes a minute and a half.
        streams = [ask(client, stream=True, max_tokens=900, temperature=2.0, seed=n) for n in (1, 2)]
        for stream in streams:
            next(iter(stream))
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"]
        for stream in streams:
            stream.close()
        assert _answers_within(client, 5.0)

        for seed in (1, 2):
            with pytest.raises(openai.APITimeoutError):
                ask(client.with_options(timeout=0.5), max_tokens=900, temperature=2.0, seed=seed)
        assert _answers_within(client, 5.0)


def _answers_within(client: openai.OpenAI, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            return bool(ask(client, max_tokens=1).choices)
        except openai.APIStatusError:
            time.sleep(0.1)
    return False


def test_sigterm_lets_an_answer_end(tiny_node: Path) -> None:
    with running(tiny_node, pause_s=0.05) as (url, process), client_of(url) as client:
        stream = iter(ask(client, stream=True, max_tokens=40, temperature=2.0, seed=1))
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(10) in (0, -signal.SIGTERM)


def refuse(root: Path, api_key_file: Path | None = None) -> None:
    """`serve` where it must end before it listens."""
    serve(root, "127.0.0.1", 0, api_key_file, max_concurrency=1, max_queue=0)


def test_flipped_bytes_are_not_served(tiny_node: Path, tmp_path: Path) -> None:
    root = tmp_path / "node"
    shutil.copytree(tiny_node, root, symlinks=True)
    weights = bytearray((root / "current" / "model.onnx.data").read_bytes())
    weights[len(weights) // 2] ^= 1
    (root / "current" / "model.onnx.data").write_bytes(weights)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data is damaged"):
        refuse(root)


def test_a_node_without_a_release_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="pull one first"):
        refuse(tmp_path)


def test_an_empty_key_is_not_an_open_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ConfigError, match="empty API key"):
        refuse(tmp_path, tmp_path / "key")
    monkeypatch.setenv("SLMOPS_API_KEY", "")
    with pytest.raises(ConfigError, match="empty API key"):
        refuse(tmp_path)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("serve", {"boto3", "kfp", "onnx", "torch", "transformers", "tuf", "typer"}),
        ("pull", {"kfp", "onnx", "onnxruntime_genai", "torch", "transformers", "typer"}),
    ],
)
def test_the_edge_imports_nothing_heavy(module: str, absent: set[str]) -> None:
    code = f"import sys, slmops.edge.{module}; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {name.partition(".")[0] for name in modules} & absent
