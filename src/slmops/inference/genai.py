"""ONNX Runtime GenAI: what runs on an edge node. Imports neither torch nor transformers."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import onnxruntime_genai as og

from slmops.errors import ModelError
from slmops.inference.runtime import Prompt, answer_losses, encode_row
from slmops.records import ChatRecord
from slmops.release.format import GENAI_CONFIG

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS = 128
"""Positions whose logits are held in double precision at once: with 150,000 tokens each takes 1.2 MB, twice."""


class TokenizedRuntime(ABC):
    """What runtimes of a quantized variant share: ONNX Runtime GenAI's tokenizer, and what comes out of logits."""

    def __init__(self, directory: Path) -> None:
        try:
            self.tokenizer = og.Tokenizer(str(directory))
        except Exception as error:  # the library raises RuntimeError, OgaException and bare Exception alike
            raise refused(directory, error) from error
        settings = json.loads((directory / GENAI_CONFIG).read_text())["model"]
        end = settings["eos_token_id"]
        self.end_tokens = set(end if isinstance(end, list) else [end])
        self.context_length = int(settings["context_length"])

    @abstractmethod
    def continue_ids(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the likeliest next token ids one by one, up to the model's end of turn."""

    @abstractmethod
    def run_streams(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[float]]:
        """Answer all prompts at once as a server does, each with `num_tokens` tokens, whatever would end a turn.

        Args:
            prompts: token ids, with room for the answer in the context.
            num_tokens: of each answer.

        Returns:
            For each prompt when its tokens came, by `time.perf_counter`.
        """

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> NDArray[Any]:
        """[tokens, vocabulary] of float, what follows each of `ids`."""

    def stream(self, prompt: Prompt, max_new_tokens: int) -> Iterator[int]:
        return self.continue_ids(self.encode_messages(prompt, to_answer=True), max_new_tokens)

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        return [self.tokenizer.decode(list(self.stream(prompt, max_new_tokens))) for prompt in prompts]

    def answer_losses(self, records: Sequence[ChatRecord]) -> list[tuple[float, int]]:
        return answer_losses(self, records)

    def encode_row(self, record: ChatRecord) -> tuple[list[int], int]:
        return encode_row(self, record)

    def log_likelihoods(self, ids: Sequence[int], num_scored: int) -> tuple[list[float], bool]:
        """Log-probabilities in nats of the last `num_scored` tokens of `ids`, each given all before it.

        Returns:
            num_scored log-probabilities, and whether each of these tokens was the likeliest.
        """
        if not num_scored:
            return [], True
        logits, targets = self.logits(ids[:-1])[-num_scored:], ids[-num_scored:]
        log_probs: list[float] = []
        for start in range(0, num_scored, ROWS):
            log_probs += _log_softmax_at(logits[start : start + ROWS], targets[start : start + ROWS])
        return log_probs, logits.argmax(-1).tolist() == list(targets)

    def encode_messages(self, messages: Prompt, *, to_answer: bool) -> list[int]:
        text = self.tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=to_answer)
        return [int(token) for token in self.tokenizer.encode(text)]


class GenAIRuntime(TokenizedRuntime):
    """A variant in the runtime that its files are made for, one answer after the other."""

    def __init__(self, directory: Path, *, num_threads: int) -> None:
        self.name = f"onnxruntime-genai {og.__version__}"
        try:
            config = og.Config(str(directory))
            config.overlay(
                json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": num_threads}}}})
            )
            self.model = og.Model(config)
        except Exception as error:
            raise refused(directory, error) from error
        super().__init__(directory)

    def continue_ids(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        generator = self._generator(min(len(ids) + max_new_tokens, self.context_length))
        generator.append_tokens(ids)
        for _ in range(max_new_tokens):
            if generator.is_done():
                return
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self.end_tokens:
                return
            yield token

    def logits(self, ids: Sequence[int]) -> NDArray[Any]:
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(ids)
        found: NDArray[Any] = generator.get_output("logits")[0]
        return found

    def run_streams(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[float]]:
        all_read = Barrier(len(prompts))

        def answer(prompt: Sequence[int]) -> list[float]:
            times: list[float] = []
            try:
                generator = self._generator(len(prompt) + num_tokens, min_length=len(prompt) + num_tokens)
                generator.append_tokens(prompt)
                for _ in range(num_tokens):
                    generator.generate_next_token()
                    times.append(time.perf_counter())
                    if len(times) == 1:
                        all_read.wait()
            except BaseException:
                all_read.abort()  # or the others would wait for ever
                raise
            return times

        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(answer, prompts))

    def _generator(self, max_length: int, min_length: int = 0) -> og.Generator:
        parameters = og.GeneratorParams(self.model)
        # The seed is not used, but finding one takes the library 20 to 50 ms on some machines.
        parameters.set_search_options(max_length=max_length, min_length=min_length, do_sample=False, random_seed=0)
        return og.Generator(self.model, parameters)


def refused(directory: Path, error: Exception) -> ModelError:
    """What the library's refusal to load `directory` means to a user."""
    return ModelError(
        f"{directory} cannot be loaded by onnxruntime-genai {og.__version__}: {str(error).splitlines()[0]}; "
        "run quantize again"
    )


def _log_softmax_at(logits: Any, targets: Sequence[int]) -> list[float]:
    """Log-softmax of each row of `logits` [rows, vocabulary] at its target."""
    import numpy as np  # a process that only answers need not hold it

    wide = logits.astype(np.float64)
    peak = wide.max(-1)
    log_sums = np.log(np.exp(wide - peak[:, None]).sum(-1)) + peak
    found: list[float] = (wide[np.arange(len(targets)), targets] - log_sums).tolist()
    return found
