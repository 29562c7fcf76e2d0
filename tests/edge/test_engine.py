"""Which engine a model gets, and what a failure in the batch does to its answers."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from slmops.edge.chat import ChatRequest, parse_request
from slmops.edge.engine import Answer, BatchedEngine, Engine, GeneratorEngine, open_engine
from slmops.errors import ModelError
from slmops.inference.slots import Slots

pytestmark = pytest.mark.slow

REQUEST = parse_request(
    {"model": "slmops", "messages": [{"role": "user", "content": "lamp on"}], "max_tokens": 30, "temperature": 0}
)


@contextmanager
def opened(directory: Path) -> Iterator[Engine]:
    engine = open_engine(directory, 4)
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: Engine, request: ChatRequest = REQUEST) -> tuple[str, Answer]:
    pieces: list[str] = []
    answer = engine.generate(engine.encode(request), request, pieces.append, threading.Event())
    return "".join(pieces), answer


def test_what_a_batch_cannot_serve_gets_a_generator(tiny_variants: Path, tmp_path: Path) -> None:
    penalized = tmp_path / "penalized"
    shutil.copytree(tiny_variants / "cpu-int4", penalized)
    config = json.loads((penalized / "genai_config.json").read_text())
    config["search"]["repetition_penalty"] = 1.3
    (penalized / "genai_config.json").write_text(json.dumps(config))
    with opened(tiny_variants / "cpu-int4") as batched, opened(penalized) as by_itself:
        assert isinstance(batched, BatchedEngine)
        assert isinstance(by_itself, GeneratorEngine)
        assert ask(batched)[1].prompt_tokens == ask(by_itself)[1].prompt_tokens


def test_both_engines_answer_alike(tiny_variants: Path) -> None:
    with opened(tiny_variants / "cpu-int4") as batched:
        assert ask(batched) == ask(GeneratorEngine(tiny_variants / "cpu-int4"))


def test_answers_of_a_step_that_fails_say_so_and_the_next_ones_are_right(
    tiny_variants: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tiny_variants / "cpu-int4") as engine, ThreadPoolExecutor(3) as threads:
        expected = ask(engine)
        steps, step = iter(range(1000)), Slots.step

        def fails_once(slots: Slots, tokens: list[int]) -> object:
            if next(steps) == 5:
                raise RuntimeError("no memory is left")
            return step(slots, tokens)

        monkeypatch.setattr(Slots, "step", fails_once)
        answers = [threads.submit(ask, engine) for _ in range(3)]
        assert "no memory is left" in {str(answer.exception(60)) for answer in answers}
        assert ask(engine) == expected


def test_an_answer_that_is_not_wanted_any_more_ends(tiny_variants: Path) -> None:
    with opened(tiny_variants / "cpu-int4") as engine:
        cancelled, pieces = threading.Event(), list[str]()

        def send(piece: str) -> None:
            pieces.append(piece)
            cancelled.set()

        answer = engine.generate(engine.encode(REQUEST), REQUEST, send, cancelled)
        assert answer.finish_reason == "cancelled"
        assert len(pieces) == 1


def test_a_model_without_a_chat_template_is_refused(tiny_variants: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_variants / "cpu-int4", bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="publish another release"):
        open_engine(bare, 1)
