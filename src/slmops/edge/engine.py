"""Answers from one model in memory: all in one batch, or each by itself where the runtime knows no other way."""

from __future__ import annotations

import json
import queue
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime_genai as og

from slmops import cpus
from slmops.edge.chat import ChatRequest, InvalidRequestError, StopStrings
from slmops.errors import ModelError
from slmops.inference.batch import Batch, Stream
from slmops.inference.sampling import Sampling, of_search
from slmops.inference.slots import NoSlotsError, Slots
from slmops.progress import log
from slmops.release.format import GENAI_CONFIG


@dataclass(frozen=True)
class Answer:
    """How a generation ended."""

    finish_reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    completion_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Engine(ABC):
    """A loaded model. `generate` may run in several threads."""

    def __init__(self, directory: Path) -> None:
        """Load the tokenizer.

        Raises:
            ModelError: the runtime refuses it, or it has no chat template.
        """
        self._settings = json.loads((directory / GENAI_CONFIG).read_text())
        self.closing = threading.Event()
        """Set when the server ends; stops every generation."""
        self._tokenizing = threading.Lock()
        try:
            self._tokenizer = og.Tokenizer(str(directory))
            self._tokenizer.apply_chat_template('[{"role": "user", "content": "?"}]', add_generation_prompt=True)
        except Exception as error:  # the library raises RuntimeError, OgaException and bare Exception alike
            raise _unloadable(directory, error) from error
        self._end_tokens = frozenset(int(token) for token in self._tokenizer.eos_token_ids)
        self.context_length = int(self._settings["model"]["context_length"])

    def close(self) -> None:  # noqa: B027 - not every engine has something to end
        """End what runs beside the answers, which have ended."""

    @abstractmethod
    def _continue(self, tokens: Any, request: ChatRequest, num_new: int) -> Generator[int]:
        """Up to `num_new` tokens that follow; without sampling settings as the model's own settings say."""

    def encode(self, request: ChatRequest) -> Any:
        """The prompt's tokens.

        Raises:
            InvalidRequestError: the chat template refuses the messages, or they leave no room for an answer.
        """
        with self._tokenizing:  # the tokenizer does not say that it may be shared
            try:
                prompt = self._tokenizer.apply_chat_template(json.dumps(request.chat), add_generation_prompt=True)
                tokens = self._tokenizer.encode(prompt)
            except Exception as error:
                raise InvalidRequestError(f"the model cannot read these messages: {error}", "messages") from None
        if len(tokens) >= self.context_length:
            raise InvalidRequestError(
                f"the messages have {len(tokens)} tokens, but the model's context length is {self.context_length}",
                "messages",
                code="context_length_exceeded",
            )
        return tokens

    def generate(
        self, tokens: Any, request: ChatRequest, send: Callable[[str], object], cancelled: threading.Event
    ) -> Answer:
        """Generate an answer, giving each piece of text to `send`; stop early when `cancelled` is set."""
        num_new = min(request.token_limit, self.context_length - len(tokens))
        pieces, stops, count = self._tokenizer.create_stream(), StopStrings(request.stop), 0
        finish_reason: Literal["stop", "length", "cancelled"] = "length"
        with closing(self._continue(tokens, request, num_new)) as found:
            for token in found:
                count += 1
                if cancelled.is_set() or self.closing.is_set():
                    finish_reason = "cancelled"
                    break
                if token in self._end_tokens:
                    finish_reason = "stop"
                    break
                if text := stops.feed(pieces.decode(token)):
                    send(text)
                if stops.found:
                    finish_reason = "stop"
                    break
        if text := stops.rest():
            send(text)
        return Answer(finish_reason, len(tokens), count)


class BatchedEngine(Engine):
    """All answers in one batch, on ONNX Runtime; a thread of its own computes their tokens."""

    def __init__(self, directory: Path, num_slots: int) -> None:
        """Load the model.

        Raises:
            NoSlotsError: its answers cannot share a batch.
            ModelError: the runtime refuses it.
        """
        super().__init__(directory)
        self._own = of_search(self._settings["search"])
        self._batch = Batch[_Stream](Slots(directory, num_slots=num_slots, num_threads=cpus.count()))
        self._arrived: queue.SimpleQueue[_Stream | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._decode, name="decode", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._arrived.put(None)
        self._thread.join()

    def _continue(self, tokens: Any, request: ChatRequest, num_new: int) -> Generator[int]:
        stream = _Stream(tokens, num_new, _sampling_of(request) or self._own, _seed_of(request))
        self._arrived.put(stream)
        try:
            for _ in range(num_new):
                token = stream.found.get()
                if isinstance(token, Exception):
                    raise token
                yield token
        finally:
            stream.gone = True

    def _decode(self) -> None:
        while True:
            while not self._batch or not self._arrived.empty():
                stream = self._arrived.get()
                if stream is None:
                    return
                self._batch.add(stream)
            try:
                self._batch.step()
            except Exception as error:  # memory, most likely: these answers fail, and the server goes on
                for dropped in self._batch.clear():
                    dropped.found.put(error)


class _Stream(Stream):
    """A stream whose tokens another thread waits for."""

    def __init__(self, tokens: Any, num_new: int, sampling: Sampling, seed: int) -> None:
        self.found: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        generator = np.random.default_rng(seed)
        super().__init__(tokens, num_new, lambda logits: sampling.choose(logits, generator), self.found.put)


class GeneratorEngine(Engine):
    """A generator of onnxruntime-genai for each answer, in the thread that asks for it."""

    def __init__(self, directory: Path) -> None:
        """Load the model.

        Raises:
            ModelError: the runtime refuses it.
        """
        super().__init__(directory)
        try:
            self._model = og.Model(str(directory))
        except Exception as error:
            raise _unloadable(directory, error) from error

    def _continue(self, tokens: Any, request: ChatRequest, num_new: int) -> Generator[int]:
        # Always a seed: finding one takes the library 20 to 50 ms on some machines.
        options: dict[str, Any] = {"max_length": len(tokens) + num_new, "random_seed": _seed_of(request)}
        if sampling := _sampling_of(request):
            options["do_sample"] = sampling.temperature > 0
            if sampling.temperature:
                options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        params = og.GeneratorParams(self._model)
        params.set_search_options(**options)
        generator = og.Generator(self._model, params)
        generator.append_tokens(tokens)
        for _ in range(num_new):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


def open_engine(directory: Path, num_slots: int) -> Engine:
    """Load a model for `num_slots` answers at a time.

    Raises:
        ModelError: the runtime refuses it, or it has no chat template.
    """
    try:
        return BatchedEngine(directory, num_slots)
    except NoSlotsError as reason:
        log.info("answers are computed one by one, not in one batch: %s", reason)
        return GeneratorEngine(directory)


def _sampling_of(request: ChatRequest) -> Sampling | None:
    """What a request asks for; None for the model's own."""
    if request.temperature is None and request.top_p is None:
        return None
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
    )


def _seed_of(request: ChatRequest) -> int:
    return secrets.randbelow(1 << 31) if request.seed is None else request.seed


def _unloadable(directory: Path, error: Exception) -> ModelError:
    return ModelError(f"onnxruntime-genai cannot load {directory}: {error}; publish another release")
