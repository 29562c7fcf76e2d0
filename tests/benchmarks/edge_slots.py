"""Many streams in one batch on onnxruntime alone: each owns a slot of the cache, and joins and leaves at any time.

onnxruntime-genai's continuous batching needs CUDA. On a CPU none can join a `Generator`, its `Engine` makes batches of
four that none can join either, and generations in several threads run one after the other. But GroupQueryAttention
takes the length of each row from the attention mask, so rows of different lengths decode in one call where their caches
are slices of one buffer: row r of the mask has a one for each of its tokens, and the kernel writes key and value behind
them. A file whose keys and values are not float32 is not for this class.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]


class Slots:
    """A variant with room for `num_slots` streams of at most `length` tokens each. Greedy."""

    def __init__(self, directory: Path, *, num_slots: int, length: int, num_threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        model = json.loads((directory / "genai_config.json").read_text())["model"]
        decoder = model["decoder"]
        self._session = ort.InferenceSession(str(directory / decoder["filename"]), options)
        shape = (num_slots, decoder["num_key_value_heads"], length, decoder["head_size"])
        self._caches: dict[str, Any] = {
            f"{{}}.{layer}.{part}": np.zeros(shape, np.float32)
            for layer in range(decoder["num_hidden_layers"])
            for part in ("key", "value")
        }
        self._logits = np.empty((num_slots, 1, model["vocab_size"]), np.float32)
        self._binding: tuple[int, int, Any] = (0, 0, None)
        self.lengths: list[int] = []
        """Tokens in the cache of each stream that is alive."""

    def admit(self, prompt: Sequence[int]) -> int:
        """Read all of a prompt but its last token into the next slot; that token, which `step` takes first."""
        slot, length = len(self.lengths), len(prompt) - 1
        if length:
            self._run(slot, slot + 1, np.array([prompt[:-1]], np.int64), np.ones((1, length), np.int64), None)
        self.lengths.append(length)
        return prompt[-1]

    def step(self, tokens: Sequence[int]) -> list[int]:
        """The next token of every stream, given its last."""
        lengths = np.array(self.lengths)
        mask = np.arange(lengths.max() + 1) <= lengths[:, None]
        logits = self._logits[: len(tokens)]
        self._run(0, len(tokens), np.array(tokens, np.int64)[:, None], mask.astype(np.int64), logits)
        self.lengths = [length + 1 for length in self.lengths]
        chosen: list[int] = logits[:, 0].argmax(-1).tolist()
        return chosen

    def leave(self, slot: int) -> None:
        """Free a slot; the last stream moves into it."""
        last = len(self.lengths) - 1
        length = self.lengths[last]
        for cache in self._caches.values():
            cache[slot, :, :length] = cache[last, :, :length]
        self.lengths[slot] = length
        self.lengths.pop()

    def _run(self, begin: int, end: int, tokens: Any, mask: Any, logits: Any) -> None:
        """Let the caches of slots begin to end grow in place, and write logits of one token a row if wanted."""
        binding = self._bind_caches(begin, end)
        for name, array in (("input_ids", tokens), ("attention_mask", mask)):
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        if logits is None:
            binding.bind_output("logits", "cpu")
        else:
            binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)

    def _bind_caches(self, begin: int, end: int) -> Any:
        if self._binding[:2] != (begin, end):
            binding = self._session.io_binding()
            for name, cache in self._caches.items():
                rows = cache[begin:end]
                address = rows.ctypes.data
                binding.bind_input(name.format("past_key_values"), "cpu", 0, np.float32, rows.shape, address)
                binding.bind_output(name.format("present"), "cpu", 0, np.float32, rows.shape, address)
            self._binding = (begin, end, binding)
        return self._binding[2]
