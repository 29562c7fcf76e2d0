"""A decoder on ONNX Runtime with room for several streams, each of which joins and leaves at any time.

onnxruntime-genai batches in this way on CUDA only: on a CPU none can join a `Generator` at work, and generations in
threads of their own run one after the other. But GroupQueryAttention takes the length of each row from the attention
mask, so rows of different lengths decode in one call where their keys and values are slices of one buffer: row r of the
mask has a one for each of its tokens, and the kernel writes key and value behind them.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from slmops import memory
from slmops.errors import DataError, ModelError
from slmops.release.format import GENAI_CONFIG

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOGITS_FROM = "logits_from"
"""Input of a graph: the first of the tokens in a call whose logits are computed."""
PROMPT_LOGITS_BYTES = 32 << 20
"""Of the logits of a prompt that are computed in one call."""
MAX_READ_TOKENS = 256
"""In one call, so that streams at work wait no longer than this for their next token."""
KEPT_TOKENS = 256
"""Memory that a stream leaves behind is kept for the next one up to this length, and given back beyond."""
MAP_NORESERVE = 0x4000
"""Of Linux; Python's mmap names it from 3.13 on."""
FLOAT, INT64 = "tensor(float)", "tensor(int64)"


class NoSlotsError(Exception):
    """A variant whose streams cannot share a batch, and why. onnxruntime-genai can run it."""


class Slots:
    """A loaded variant. Of one more slot than there are streams, the last is where a prompt is read."""

    def __init__(self, directory: Path, *, num_slots: int, num_threads: int) -> None:
        """Load the variant.

        Raises:
            NoSlotsError: it is not for a CPU, or its keys and values are not kept as this class does.
            ModelError: the runtime refuses it.
        """
        settings = json.loads((directory / GENAI_CONFIG).read_text())
        model, decoder = settings["model"], settings["model"]["decoder"]
        if not settings.get("search", {}).get("past_present_share_buffer"):
            raise NoSlotsError("its keys and values do not grow in place")
        if decoder.get("pipeline") or "sliding_window" in decoder:
            raise NoSlotsError("its decoder is a pipeline, or attends to a window")
        if decoder.get("session_options", {}).get("provider_options"):
            raise NoSlotsError("it is not for a CPU")
        try:
            self._names = _names(decoder)
            num_heads, head_size = int(decoder["num_key_value_heads"]), int(decoder["head_size"])
        except (KeyError, TypeError) as error:
            raise NoSlotsError(f"its {GENAI_CONFIG} does not say what is kept of each token ({error})") from None
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(
                str(directory / decoder["filename"]), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # a class of its own for each code, all below Exception
            raise ModelError(
                f"{directory} cannot be loaded by onnxruntime {ort.__version__}: {str(error).splitlines()[0]}; "
                "run quantize again"
            ) from error
        self.num_slots, self.context_length = num_slots, int(model["context_length"])
        inputs = {entry.name: entry.type for entry in self._session.get_inputs()}
        expected = {"input_ids": INT64, "attention_mask": INT64} | {past: FLOAT for past, _ in self._names}
        if inputs not in (expected, expected | {"position_ids": INT64}):
            raise NoSlotsError("its inputs are not tokens, a mask, and keys and values in float32")
        logits = next((entry for entry in self._session.get_outputs() if entry.name == "logits"), None)
        if logits is None or logits.type != FLOAT or not isinstance(logits.shape[-1], int):
            raise NoSlotsError("it has no logits in float32 for a vocabulary of one size")
        self.vocab_size = logits.shape[-1]
        shape = (num_slots + 1, num_heads, self.context_length, head_size)
        self._memory = _reserve(len(self._names) * math.prod(shape) * 4)
        self._caches = np.frombuffer(self._memory, np.float32).reshape(len(self._names), *shape)
        self._logits = np.empty((num_slots, 1, self.vocab_size), np.float32)
        optional = {entry.name for entry in self._session.get_overridable_initializers()}
        self._inputs = inputs.keys() | (optional & {LOGITS_FROM})
        self._most_logits = max(16, PROMPT_LOGITS_BYTES // (4 * self.vocab_size))
        self._bindings: dict[tuple[int, int], Any] = {}
        self._touched = np.zeros(num_slots + 1, np.int64)  # tokens of each slot that have become memory
        self.lengths: list[int] = []
        """Tokens of each stream: those in the first slots."""
        self.max_tokens = memory.key_value_bytes() // (4 * len(self._names) * num_heads * head_size)
        """Of all streams together, for which there is memory."""

    def read(self, ids: Sequence[int], start: int, *, all_logits: bool = False) -> tuple[int, NDArray[Any]]:
        """Read on in a prompt, whose first `start` tokens have been read, in the slot for that.

        Returns:
            How many tokens have been read, and logits [tokens, vocabulary]: of those read now, or at least of the last.

        Raises:
            DataError: the prompt is longer than the model's context.
        """
        if len(ids) > self.context_length:
            raise DataError(
                f"a text has {len(ids):,} tokens, more than the model's context_length of {self.context_length:,}; "
                "shorten it"
            )
        last_only = LOGITS_FROM in self._inputs and not all_logits
        end = min(len(ids), start + (MAX_READ_TOKENS if last_only else min(MAX_READ_TOKENS, self._most_logits)))
        self._touched[-1] = max(self._touched[-1], end)
        logits = np.empty((1, 1 if last_only else end - start, self.vocab_size), np.float32)
        inputs = {
            "input_ids": np.array([ids[start:end]], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end)[None],
            LOGITS_FROM: np.array([end - start - 1 if last_only else 0], np.int64),
        }
        self._run(self._bind(self.num_slots, self.num_slots + 1), inputs, logits)
        return end, logits[0]

    def join(self, length: int) -> None:
        """Make a stream of the prompt that was read, which has `length` tokens: the last of the streams."""
        self._move(self.num_slots, len(self.lengths), length)
        self.lengths.append(length)

    def step(self, tokens: Sequence[int]) -> NDArray[Any]:
        """What follows the next token of every stream: logits [streams, vocabulary], valid until the next step."""
        count = len(self.lengths)
        lengths = np.array(self.lengths)
        mask = np.arange(lengths.max() + 1) <= lengths[:, None]
        logits = self._logits[:count]
        inputs = {
            "input_ids": np.array(tokens, np.int64)[:, None],
            "attention_mask": mask.astype(np.int64),
            "position_ids": lengths[:, None],
        }
        self._run(self._bind(0, count), inputs, logits)
        self.lengths = [length + 1 for length in self.lengths]
        self._touched[:count] = np.maximum(self._touched[:count], self.lengths)
        return logits[:, 0]

    def leave(self, stream: int) -> None:
        """End a stream; the last one takes its place."""
        length = self.lengths.pop()
        last = len(self.lengths)
        if stream == last:
            self._give_back(last, 0)
        else:
            self._move(last, stream, length)
            self.lengths[stream] = length

    def _move(self, source: int, target: int, length: int) -> None:
        self._caches[:, target, :, :length] = self._caches[:, source, :, :length]
        self._touched[target] = max(self._touched[target], length)
        self._give_back(source, 0)
        self._give_back(target, length)

    def _give_back(self, slot: int, length: int) -> None:
        """Let the memory behind the first `length` tokens of a slot go, but for what is kept."""
        kept, touched = max(length, KEPT_TOKENS), int(self._touched[slot])
        if touched <= kept:
            return
        num_parts, _, num_heads, _, _ = self._caches.shape
        per_part, per_slot, per_head, per_token, _ = self._caches.strides
        for part, head in itertools.product(range(num_parts), range(num_heads)):
            begin = part * per_part + slot * per_slot + head * per_head
            start = -(-(begin + kept * per_token) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (begin + touched * per_token) // mmap.PAGESIZE * mmap.PAGESIZE
            if start < end:  # a page that another slot or head has a part of stays
                self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)
        self._touched[slot] = kept

    def _run(self, binding: Any, inputs: dict[str, NDArray[Any]], logits: NDArray[Any]) -> None:
        for name, array in inputs.items():
            if name in self._inputs:
                binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)

    def _bind(self, begin: int, end: int) -> Any:
        """A binding in which keys and values of slots `begin` to `end` grow in place."""
        if (begin, end) not in self._bindings:
            binding = self._session.io_binding()
            for (past, present), cache in zip(self._names, self._caches[:, begin:end], strict=True):
                binding.bind_input(past, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
                binding.bind_output(present, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
            self._bindings[begin, end] = binding
        return self._bindings[begin, end]


def _names(decoder: dict[str, Any]) -> list[tuple[str, str]]:
    """Of keys and values: what goes in, and what comes out."""
    inputs, outputs = decoder["inputs"], decoder["outputs"]
    return [
        (inputs[f"past_{part}_names"] % layer, outputs[f"present_{part}_names"] % layer)
        for layer in range(decoder["num_hidden_layers"])
        for part in ("key", "value")
    ]


def _reserve(size_bytes: int) -> mmap.mmap:
    """Addresses whose pages become memory when they are written, each by itself: as much as streams have tokens."""
    reserved = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    reserved.madvise(mmap.MADV_NOHUGEPAGE)
    return reserved
