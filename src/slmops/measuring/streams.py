"""Prompts of an exact length, and several answers at once, on ONNX Runtime GenAI, token by token.

Answers run as the edge server runs them: one model, and for each answer a generator in a thread of its own. They go on
for a fixed number of tokens, whatever the model says, so that runs can be compared.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import onnxruntime_genai as og

MAX_SAMPLES = 5
SAMPLES_S = 2.0
"""No further sample of a prompt length is begun after this time: a slow device measures a long prompt once."""
PROMPT_TOKENS = 32
"""Of the prompts of `decode`."""
DECODED_TOKENS = 64
"""Of each of its answers, after the first."""


def prompt_of(ids: Sequence[int], num_tokens: int) -> list[int]:
    """`ids` again and again, up to `num_tokens`."""
    return list(itertools.islice(itertools.cycle(ids), num_tokens))


def fitting(lengths: Sequence[int], context_length: int) -> list[int]:
    """Those prompt lengths that leave room for a token."""
    return [length for length in lengths if length < context_length]


def time_first_tokens(runtime: Any, ids: Sequence[int], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds to the first token after prompts of `lengths` tokens, each several times."""
    found = []
    for length in lengths:
        prompt, first_s = prompt_of(ids, length), list[float]()
        started = time.perf_counter()
        while len(first_s) < MAX_SAMPLES and (not first_s or time.perf_counter() - started < SAMPLES_S):
            began = time.perf_counter()
            tokens = _Answer(runtime.model, prompt, 1)
            next(tokens)
            first_s.append(time.perf_counter() - began)
        found.append({"prompt_tokens": tokens.num_prompt_tokens, "first_s": first_s})
    return found


def decode(
    runtime: Any, ids: Sequence[int], counts: Sequence[int], context_length: int, peak_rss_bytes: Callable[[], int]
) -> list[dict[str, Any]]:
    """Speed of `counts` answers at once, from when all have their first token until all are done."""
    num_prompt = max(1, min(PROMPT_TOKENS, context_length // 4))
    num_new = min(DECODED_TOKENS, context_length - num_prompt - 1)
    found = []
    for count in counts:
        prompts = [prompt_of(ids[number % len(ids) :] or ids, num_prompt) for number in range(count)]
        num_tokens, seconds = _together(runtime.model, prompts, num_new)
        found.append(
            {"streams": count, "num_tokens": num_tokens, "seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}
        )
    return found


def _together(model: Any, prompts: Sequence[Sequence[int]], num_new: int) -> tuple[int, float]:
    """Tokens after the first of each answer, and the seconds that all of them took."""
    start = threading.Barrier(len(prompts))

    def answer(prompt: Sequence[int]) -> tuple[float, float, int]:
        tokens = _Answer(model, prompt, 1 + num_new)
        next(tokens)
        start.wait()
        began = time.perf_counter()
        count = sum(1 for _ in tokens)
        return began, time.perf_counter(), count

    with ThreadPoolExecutor(len(prompts)) as threads:
        begins, ends, counts = zip(*threads.map(answer, prompts), strict=True)
    return sum(counts), max(ends) - min(begins)


class _Answer(Iterator[int]):
    """The likeliest next tokens, `num_new` of them: the end of turn is not taken."""

    def __init__(self, model: Any, prompt: Sequence[int], num_new: int) -> None:
        length = len(prompt) + num_new
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, random_seed=0)
        self._generator = og.Generator(model, parameters)
        self._generator.append_tokens(list(prompt))
        self.num_prompt_tokens = self._generator.token_count()
        self._left = num_new

    def __next__(self) -> int:
        if not self._left:
            raise StopIteration
        self._left -= 1
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])
