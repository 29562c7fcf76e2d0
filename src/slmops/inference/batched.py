"""Quantized variants on ONNX Runtime, several answers at a time: what the edge server runs, wherever it can."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]
import onnxruntime_genai as og

from slmops.inference.batch import Batch, Stream
from slmops.inference.genai import TokenizedRuntime
from slmops.inference.runtime import Prompt
from slmops.inference.slots import Slots

if TYPE_CHECKING:
    from numpy.typing import NDArray


class BatchedRuntime(TokenizedRuntime):
    """A variant with slots. One of its methods at a time: all answer in the same slots."""

    def __init__(self, directory: Path, *, num_threads: int, num_slots: int) -> None:
        """Load the variant.

        Raises:
            NoSlotsError: only onnxruntime-genai can run it.
            ModelError: the runtime refuses it.
        """
        self.name = f"onnxruntime-genai {og.__version__} (onnxruntime {ort.__version__}, one batch)"
        self.slots = Slots(directory, num_slots=num_slots, num_threads=num_threads)
        super().__init__(directory)

    def continue_ids(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        batch, found = Batch[Stream](self.slots), deque[int]()
        batch.add(self._answering(ids, max_new_tokens, found.append))
        try:
            while batch:
                batch.step()
                if found:
                    yield found.popleft()
        finally:
            batch.clear()

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        batch, answers = Batch[Stream](self.slots), [list[int]() for _ in prompts]
        for prompt, answer in zip(prompts, answers, strict=True):
            batch.add(self._answering(self.encode_messages(prompt, to_answer=True), max_new_tokens, answer.append))
        self._finish(batch)
        return [self.tokenizer.decode(answer) for answer in answers]

    def run_streams(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[float]]:
        batch, times = Batch[Stream](self.slots), [list[float]() for _ in prompts]
        for prompt, moments in zip(prompts, times, strict=True):
            batch.add(Stream(prompt, num_tokens, likeliest, _noting(moments)))
        self._finish(batch)
        return times

    def logits(self, ids: Sequence[int]) -> NDArray[Any]:
        found, num_read = np.empty((len(ids), self.slots.vocab_size), np.float32), 0
        while num_read < len(ids):
            end, logits = self.slots.read(ids, num_read, all_logits=True)
            found[num_read:end] = logits
            num_read = end
        return found

    def _answering(self, ids: Sequence[int], max_new_tokens: int, keep: Callable[[int], object]) -> Stream:
        """A stream that ends with the model's turn; `keep` is given each token before that."""

        def take(token: int) -> None:
            if token in self.end_tokens:
                stream.gone = True
            else:
                keep(token)

        stream = Stream(ids, max_new_tokens, likeliest, take)
        return stream

    def _finish(self, batch: Batch[Stream]) -> None:
        try:
            while batch:
                batch.step()
        finally:
            batch.clear()


def _noting(times: list[float]) -> Callable[[int], object]:
    return lambda _: times.append(time.perf_counter())


def likeliest(logits: NDArray[Any]) -> int:
    """The token with the highest of `logits` [vocabulary]."""
    return int(logits.argmax())
