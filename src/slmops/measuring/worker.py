"""The measured process: loads one model, answers prompts, prints what it saw as lines of JSON, the last one the result.

`python -m slmops.measuring.worker` reads its task from standard input. Nothing else runs in this process, and only the
runtime that is measured is imported, so its peak memory is what a server of this model needs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


def main() -> None:
    task = json.load(sys.stdin)
    if task["cpus"]:
        os.sched_setaffinity(0, task["cpus"])  # before any library starts its threads, which inherit it
    started = time.perf_counter()
    runtime = _open(task)
    result: dict[str, Any] = {"runtime": runtime.name, "load_s": time.perf_counter() - started}
    next(iter(runtime.stream(task["prompts"][0], task["max_new_tokens"])), None)
    print(json.dumps({"first_token_at": time.monotonic()}), flush=True)
    for prompt in task["warmup_prompts"]:
        list(runtime.stream(prompt, task["max_new_tokens"]))
    result |= _requests(runtime, task) | {"peak_rss_bytes": peak_rss_bytes(), "prompts": [], "streams": []}
    if task["by_token"]:
        result |= _by_token(runtime, task)
    result |= {"peak_rss_bytes_max": peak_rss_bytes(), "cpus": sorted(_cpus_of_threads())}
    print(json.dumps(result), flush=True)


def _open(task: dict[str, Any]) -> Any:
    from slmops.inference.runtime import open_runtime

    return open_runtime(
        Path(task["directory"]),
        quantized=task["quantized"],
        dtype=task["dtype"],
        num_threads=task["num_threads"],
        batch_size=max(task["streams"], default=1),
    )


def _requests(runtime: Any, task: dict[str, Any]) -> dict[str, Any]:
    """One request after the other; with the energy that they took, where the machine counts it."""
    from slmops.measuring import energy

    before, requests = energy.read(), []
    for prompt in task["prompts"]:
        requests.append(_measure(runtime, prompt, task["max_new_tokens"]))
        print(json.dumps({"done": len(requests)}), flush=True)
    after = energy.read()
    return {"requests": requests} | ({"energy_j": before.joules_until(after)} if before and after else {})


def _measure(runtime: Any, prompt: list[dict[str, str]], max_new_tokens: int) -> dict[str, float]:
    """Seconds to the first token and to the last, and how many tokens. The end-of-turn token counts in time only."""
    started = time.perf_counter()
    first_s = 0.0
    num_tokens = 0
    for _ in runtime.stream(prompt, max_new_tokens):
        num_tokens += 1
        if num_tokens == 1:
            first_s = time.perf_counter() - started
    total_s = time.perf_counter() - started
    return {"first_s": round(first_s or total_s, 6), "total_s": round(total_s, 6), "num_tokens": num_tokens}


def _by_token(runtime: Any, task: dict[str, Any]) -> dict[str, Any]:
    """Prompts of exact lengths, and several answers at once."""
    from slmops.measuring import streams

    context_length = min(task["context_length"] or runtime.context_length, runtime.context_length)
    texts = [turn["content"] for prompt in task["prompts"] for turn in prompt]
    ids = [int(token) for token in runtime.tokenizer.encode("\n".join(texts))]
    return {
        "prompts": streams.time_first_tokens(runtime, ids, streams.fitting(task["prompt_lengths"], context_length)),
        "streams": streams.decode(runtime, ids, task["streams"], context_length, peak_rss_bytes),
    }


def peak_rss_bytes() -> int:
    """The highest resident memory of this process so far, from the kernel's own account."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _cpus_of_threads() -> set[int]:
    """The CPUs that the threads of this process, the runtime's among them, may use."""
    cpus: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            cpus |= os.sched_getaffinity(int(thread))
    return cpus


if __name__ == "__main__":
    main()
