"""Prompts of an exact length, and several answers at once, token by token, as the edge server runs them.

Answers go on for a fixed number of tokens, whatever the model says, so that runs can be compared.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmops.inference.genai import TokenizedRuntime

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


def time_first_tokens(runtime: TokenizedRuntime, ids: Sequence[int], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds to the first token after prompts of `lengths` tokens, each several times."""
    found = []
    for length in lengths:
        prompt, first_s = prompt_of(ids, length), list[float]()
        started = time.perf_counter()
        while len(first_s) < MAX_SAMPLES and (not first_s or time.perf_counter() - started < SAMPLES_S):
            began = time.perf_counter()
            runtime.run_streams([prompt], 1)
            first_s.append(time.perf_counter() - began)
        found.append({"prompt_tokens": length, "first_s": first_s})
    return found


def decode(
    runtime: TokenizedRuntime,
    ids: Sequence[int],
    counts: Sequence[int],
    context_length: int,
    peak_rss_bytes: Callable[[], int],
) -> list[dict[str, Any]]:
    """Speed of `counts` answers at once, from when all have their first token until all are done."""
    num_prompt = max(1, min(PROMPT_TOKENS, context_length // 4))
    num_new = min(DECODED_TOKENS, context_length - num_prompt - 1)
    found = []
    for count in counts:
        prompts = [prompt_of(ids[number % len(ids) :] or ids, num_prompt) for number in range(count)]
        times = runtime.run_streams(prompts, 1 + num_new)
        begin, end = max(moments[0] for moments in times), max(moments[-1] for moments in times)
        num_tokens = sum(moment > begin for moments in times for moment in moments)
        found.append(
            {"streams": count, "num_tokens": num_tokens, "seconds": end - begin, "peak_rss_bytes": peak_rss_bytes()}
        )
    return found
