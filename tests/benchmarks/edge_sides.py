"""A turn of `tests.benchmarks.edge`: ours on onnxruntime, or transformers in float32, in a process of its own.

    python -m tests.benchmarks.edge_sides task.json

Only what is measured is imported, so that the peak of memory is that of a server. No token ends an answer.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Ids = list[list[int]]


class Threads:
    """onnxruntime-genai with a generation for each stream, each in a thread of its own."""

    def __init__(self, task: dict[str, Any]) -> None:
        import onnxruntime_genai as og

        self.og = og
        config = og.Config(task["model"])
        session = {"intra_op_num_threads": task["threads"]}
        config.overlay(json.dumps({"model": {"eos_token_id": task["no_end"], "decoder": {"session_options": session}}}))
        self.model = og.Model(config)

    def measure(self, prompts: Ids, num_tokens: int) -> dict[str, Any]:
        first_s, answers = [0.0] * len(prompts), [[0]] * len(prompts)

        def answer(stream: int) -> None:
            generator = self._generator(len(prompts[stream]) + num_tokens)
            generator.append_tokens(prompts[stream])
            answers[stream] = []
            for _ in range(num_tokens):
                generator.generate_next_token()
                answers[stream].append(int(generator.get_next_tokens()[0]))
                first_s[stream] = first_s[stream] or time.perf_counter() - started

        threads = [threading.Thread(target=answer, args=(stream,)) for stream in range(len(prompts))]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"first_s": first_s, "total_s": time.perf_counter() - started, "answers": answers}

    def score(self, text: Sequence[int]) -> Any:
        generator = self._generator(len(text) + 1)
        generator.append_tokens(text)
        return generator.get_output("logits")[0]

    def _generator(self, max_length: int) -> Any:
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=max_length, do_sample=False)
        return self.og.Generator(self.model, parameters)


class Batch:
    """onnxruntime with all streams in one batch: the edge server's way."""

    def __init__(self, task: dict[str, Any]) -> None:
        from slmops.inference.slots import Slots

        num_slots = max(task["streams"], default=1)
        self.slots = Slots(Path(task["model"]), num_slots=num_slots, num_threads=task["threads"])

    def measure(self, prompts: Ids, num_tokens: int) -> dict[str, Any]:
        from slmops.inference.batch import Batch, Stream
        from slmops.inference.batched import likeliest

        times: list[list[float]] = [[] for _ in prompts]
        answers: Ids = [[] for _ in prompts]

        def taking(stream: int) -> Callable[[int], None]:
            def take(token: int) -> None:
                answers[stream].append(token)
                times[stream].append(time.perf_counter() - started)

            return take

        batch = Batch[Stream](self.slots)
        started = time.perf_counter()
        for number, prompt in enumerate(prompts):
            batch.add(Stream(prompt, num_tokens, likeliest, taking(number)))
        while batch:
            batch.step()
        total_s = time.perf_counter() - started
        return {"first_s": [moments[0] for moments in times], "total_s": total_s, "answers": answers}


class Torch:
    """transformers' generate in float32, prompts padded on their left."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(task["threads"])
        self.model: Any = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).eval()

    def measure(self, prompts: Ids, num_tokens: int) -> dict[str, Any]:
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        times: list[float] = []

        def note_time(ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter() - started)
            return torch.zeros(len(prompts), dtype=torch.bool)

        started = time.perf_counter()
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=mask,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                stopping_criteria=[note_time],
            )
        total_s = time.perf_counter() - started
        return {"first_s": times[:1] * len(prompts), "total_s": total_s, "answers": output[:, width:].tolist()}

    def score(self, text: Sequence[int]) -> Any:
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor([list(text)])).logits[0].numpy()

    def bytes_read_per_s(self) -> float:
        """What the memory gives to all threads that read 1 GiB; the best of 8."""
        import torch

        numbers = torch.ones(1 << 28)
        seconds = []
        for _ in range(8):
            started = time.perf_counter()
            numbers.sum()
            seconds.append(time.perf_counter() - started)
        return numbers.numel() * numbers.element_size() / min(seconds)


SIDES = {"threads": Threads, "batch": Batch, "torch": Torch}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    started = time.perf_counter()
    side: Any = SIDES[task["side"]](task)
    result: dict[str, Any] = {"load_s": time.perf_counter() - started}
    if task["do"] == "score":
        np.save(task["output"], np.concatenate([side.score(text)[:-1] for text in task["texts"]]))
    else:
        side.measure(task["prompts"][:1], 8)
        result["runs"] = [side.measure(task["prompts"][:count], task["num_tokens"]) for count in task["streams"]]
    result["peak_rss_bytes"] = _peak_rss_bytes()
    if task["side"] == "torch" and task["do"] == "measure":
        result["bytes_read_per_s"] = side.bytes_read_per_s()
    print(json.dumps(result))


def _peak_rss_bytes() -> int:
    """The highest resident memory of this process so far, from the kernel's own account."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
