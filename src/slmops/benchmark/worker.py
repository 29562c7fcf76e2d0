"""The measured process: loads one model, answers prompts one after the other, prints what it saw as one JSON line.

`python -m slmops.benchmark.worker` reads its task from standard input. Nothing else runs in this process, and only the
runtime that is measured is imported, so its peak memory is what a server of this model needs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    task = json.load(sys.stdin)
    started = time.perf_counter()
    runtime = _open(task)
    load_s = time.perf_counter() - started
    for prompt in task["warmup_prompts"]:
        list(runtime.stream(prompt, task["max_new_tokens"]))
    requests = []
    for prompt in task["prompts"]:
        requests.append(_measure(runtime, prompt, task["max_new_tokens"]))
        print(json.dumps({"done": len(requests)}), flush=True)
    print(
        json.dumps(
            {
                "runtime": runtime.name,
                "load_s": load_s,
                "requests": requests,
                "peak_rss_bytes": peak_rss_bytes(),
            }
        ),
        flush=True,
    )


def _open(task: dict[str, Any]) -> Any:
    from slmops.inference.runtime import open_runtime

    return open_runtime(
        Path(task["directory"]), quantized=task["quantized"], dtype=task["dtype"], num_threads=task["num_threads"]
    )


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
    return {"first_s": first_s or total_s, "total_s": total_s, "num_tokens": num_tokens}


def peak_rss_bytes() -> int:
    """The highest resident memory of this process so far, from the kernel's own account."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    main()
