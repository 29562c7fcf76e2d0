"""Generation with ONNX Runtime GenAI: one model in memory, a few generations at once, each in a thread of its own."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slmops.edge.chat import ChatRequest, InvalidRequestError, StopStrings
from slmops.errors import ModelError
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


class Engine:
    """A loaded model. `generate` may run in several threads."""

    def __init__(self, directory: Path) -> None:
        """Load the model.

        Raises:
            ModelError: the runtime refuses it, or it has no chat template.
        """
        try:
            import onnxruntime_genai as og
        except ImportError as error:
            raise ModelError(f"onnxruntime-genai cannot be imported ({error}); pip install 'slmops[edge]'") from None
        self._og = og
        self.closing = threading.Event()
        """Set when the server ends; stops every generation."""
        self._tokenizing = threading.Lock()
        try:
            self._model = og.Model(str(directory))
            self._tokenizer = og.Tokenizer(self._model)
            self._tokenizer.apply_chat_template('[{"role": "user", "content": "?"}]', add_generation_prompt=True)
        except Exception as error:
            raise ModelError(f"onnxruntime-genai cannot load {directory}: {error}; publish another release") from error
        self._end_tokens = frozenset(int(token) for token in self._tokenizer.eos_token_ids)
        self.context_length = int(json.loads((directory / GENAI_CONFIG).read_text())["model"]["context_length"])

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
        limit = min(len(tokens) + request.token_limit, self.context_length)
        generator = self._generator(request, limit)
        generator.append_tokens(tokens)
        pieces, stops, count = self._tokenizer.create_stream(), StopStrings(request.stop), 0
        finish_reason: Literal["stop", "length", "cancelled"] = "length"
        while len(tokens) + count < limit:
            if cancelled.is_set() or self.closing.is_set():
                finish_reason = "cancelled"
                break
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            count += 1
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

    def _generator(self, request: ChatRequest, limit: int) -> Any:
        """Without sampling settings the model decodes as its own settings say: as the gate has measured it."""
        options: dict[str, Any] = {"max_length": limit}
        if request.temperature == 0:
            options["do_sample"] = False
        elif request.temperature is not None or request.top_p is not None:
            temperature = 1.0 if request.temperature is None else request.temperature
            top_p = 1.0 if request.top_p is None else request.top_p
            options.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
        # Always one: finding a seed takes the library 20 to 50 ms on some machines.
        options["random_seed"] = secrets.randbelow(1 << 31) if request.seed is None else request.seed
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(**options)
        return self._og.Generator(self._model, params)
