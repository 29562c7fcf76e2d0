"""ExecuTorch with its XNNPACK delegate. Imports torch, whose tensors its Python binding takes, but not transformers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.errors import DataError, ModelError
from slmops.inference.conversation import Conversation
from slmops.inference.executorch_files import PROGRAM, read_settings
from slmops.inference.runtime import Prompt, answer_losses, encode_row
from slmops.records import ChatRecord

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

METHOD = "forward"

OPERATORS = ("extension/llm/custom_ops/libcustom_ops_aot_lib.so", "kernels/quantized/libquantized_ops_aot_lib.so")
"""Libraries of the package with operators that the binding itself has not: cached attention, embeddings of few bits."""


class ExecuTorchRuntime:
    """A program and its key-value cache, which holds one conversation at a time.

    Answers may be read by turns: one that finds the cache taken by another computes its own tokens again. Several
    threads must not call one runtime at once.
    """

    def __init__(self, directory: Path, *, num_threads: int) -> None:
        """
        Raises:
            ArtifactError: a file is missing.
            ModelError: a file is damaged, or the program does not run here.
        """
        binding = _load_binding()
        self.name = f"executorch {importlib.metadata.version('executorch')}"
        settings = read_settings(directory)
        self.tokenizer = Conversation(directory)
        self.directory, self.context_length = directory, settings.context_length
        self.end_tokens = frozenset(settings.end_token_ids)
        self._max_tokens, self._max_scored = settings.max_tokens_per_call, settings.max_scored_per_call
        self._cached_of: list[int] | None = None
        self._num_cached = 0
        if binding._threadpool_get_thread_count() != num_threads:
            binding._unsafe_reset_threadpool(num_threads)  # unsafe only while a program runs
        try:
            self._module = binding._load_for_executorch(str(directory / PROGRAM))
            self._forward([0], 0, [0])  # its weights are packed for this processor on the first call
        except Exception as error:  # the binding raises RuntimeError and bare exceptions of pybind11
            raise ModelError(
                f"{directory} cannot be loaded by {self.name}: {str(error).splitlines()[0]}; run quantize again"
            ) from error

    def stream(self, prompt: Prompt, max_new_tokens: int) -> Iterator[int]:
        return self.continue_ids(self.encode_messages(prompt, to_answer=True), max_new_tokens)

    def continue_ids(self, ids: Sequence[int], max_new_tokens: int, *, to_the_end: bool = False) -> Iterator[int]:
        """Yield the likeliest next token ids one by one, up to the model's end of turn.

        Args:
            ids: what they continue.
            max_new_tokens: how many at most; the context length bounds them too.
            to_the_end: go on behind an end of turn, so that speeds can be compared.

        Raises:
            DataError: there is no token to continue, or no room for another.
        """
        if not 0 < len(ids) < self.context_length:
            raise DataError(
                f"the prompt has {len(ids)} tokens, and {self.directory} has room for 1 to {self.context_length - 1} "
                "and an answer; shorten the prompt, or quantize with a longer context_length"
            )
        return self._continue(list(ids), min(max_new_tokens, self.context_length - len(ids)), to_the_end)

    def _continue(self, tokens: list[int], num_new: int, to_the_end: bool) -> Iterator[int]:
        for _ in range(num_new):
            token = int(self._last_logits(tokens).argmax())
            if token in self.end_tokens and not to_the_end:
                return
            yield token
            tokens.append(token)

    def encode_messages(self, messages: Prompt, *, to_answer: bool) -> list[int]:
        return self.tokenizer.encode_messages(messages, to_answer=to_answer)

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        return [self.tokenizer.decode(list(self.stream(prompt, max_new_tokens))) for prompt in prompts]

    def answer_losses(self, records: Sequence[ChatRecord]) -> list[tuple[float, int]]:
        return answer_losses(self, records)

    def encode_row(self, record: ChatRecord) -> tuple[list[int], int]:
        return encode_row(self, record)

    def logits(self, ids: Sequence[int]) -> NDArray[Any]:
        import numpy as np

        return np.concatenate([part.numpy().copy() for part in self._scored(ids, 0)])

    def log_likelihoods(self, ids: Sequence[int], num_scored: int) -> tuple[list[float], bool]:
        """Log-probabilities in nats of the last `num_scored` tokens of `ids`, each given all before it.

        Returns:
            num_scored log-probabilities, and whether each of these tokens was the likeliest.

        Raises:
            DataError: `ids` are longer than the context.
        """
        if not num_scored:
            return [], True
        at, found, likeliest = len(ids) - num_scored, list[float](), True
        for part in self._scored(ids[:-1], at - 1):
            targets = ids[at : at + len(part)]
            log_probs = part.double().log_softmax(-1)
            found += [float(row[target]) for row, target in zip(log_probs, targets, strict=True)]
            likeliest = likeliest and part.argmax(-1).tolist() == list(targets)
            at += len(part)
        return found, likeliest

    def _scored(self, ids: Sequence[int], first: int) -> Iterator[torch.Tensor]:
        """[rows, vocabulary] of what follows each of `ids` from the position `first` on; valid up to the next part."""
        if not 0 < len(ids) <= self.context_length:
            raise DataError(
                f"the row has {len(ids)} tokens, and {self.directory} has room for 1 to {self.context_length}; leave "
                "it out, or quantize with a longer context_length"
            )
        self._cached_of = None
        self._read(ids[:first], 0)
        for start in range(first, len(ids), self._max_scored):
            chunk = ids[start : start + self._max_scored]
            yield self._forward(chunk, start, range(len(chunk)))

    def _last_logits(self, tokens: list[int]) -> torch.Tensor:
        """[vocabulary] of what follows `tokens`. What the cache holds of this very list is not computed again."""
        start = self._num_cached if self._cached_of is tokens else 0
        self._cached_of = None  # if a call fails in the middle, the cache is nobody's
        logits: torch.Tensor = self._read(tokens[start:], start)
        self._cached_of, self._num_cached = tokens, len(tokens)
        return logits

    def _read(self, ids: Sequence[int], start: int) -> Any:
        """Take `ids` into the cache from the position `start` on; the logits behind the last one."""
        logits = None
        for offset in range(0, len(ids), self._max_tokens):
            chunk = ids[offset : offset + self._max_tokens]
            logits = self._forward(chunk, start + offset, [len(chunk) - 1])[0]
        return logits

    def _forward(self, ids: Sequence[int], start: int, scored: Sequence[int]) -> torch.Tensor:
        """[scored, vocabulary], in memory that the next call overwrites."""
        import torch

        inputs = (torch.tensor([list(ids)]), torch.tensor([start]), torch.tensor(list(scored)))
        found: torch.Tensor = self._module.run_method(METHOD, inputs, clone_outputs=False)[0][0]
        return found


def _load_binding() -> Any:
    """ExecuTorch's Python binding with all operators that a program may call.

    It is imported by its own name: `executorch.runtime`, which wraps it, imports the exporter too, 130 MB and 3 s.

    Raises:
        ModelError: the package is not installed.
    """
    if importlib.util.find_spec("executorch") is None:
        raise ModelError("the variant is for ExecuTorch, which is not installed; run: pip install 'slmops[executorch]'")
    import torch  # the binding does not find its symbols otherwise
    from executorch.extension.pybindings import _C

    package = Path(_C.__file__).parents[2]
    for library in OPERATORS:
        torch.ops.load_library(package / library)
    return _C
