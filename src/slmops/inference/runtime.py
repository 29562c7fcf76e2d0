"""One interface over the runtimes that a model can run on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slmops.records import ChatRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

Prompt = Sequence[dict[str, str]]
"""The turns of a conversation up to where the assistant answers."""


class Runtime(Protocol):
    """A loaded model. Decoding is greedy and ends at the model's end of turn."""

    name: str
    """Library and version, such as `onnxruntime-genai 0.18.0`."""

    def stream(self, prompt: Prompt, max_new_tokens: int) -> Iterator[int]:
        """Yield the answer's token ids one by one, as they are found."""

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """Answer each prompt."""

    def answer_losses(self, records: Sequence[ChatRecord]) -> list[tuple[float, int]]:
        """For each record, the negative log-likelihood of its completion in nats, and the completion's tokens."""


class TokenRuntime(Runtime, Protocol):
    """A loaded model that shows what it thinks of each token."""

    @property
    def context_length(self) -> int:
        """Tokens that it takes at most."""

    def encode_row(self, record: ChatRecord) -> tuple[list[int], int]:
        """The token ids of a conversation up to the end of its last turn, and how many of them are its prompt."""

    def logits(self, ids: Sequence[int]) -> NDArray[Any]:
        """[tokens, vocabulary] of float, what follows each of `ids`."""


def shortest_first(prompts: Sequence[Prompt]) -> list[int]:
    """Their indices in the order of their length, in which neighbours make batches with little padding."""
    return sorted(range(len(prompts)), key=lambda index: sum(len(turn["content"]) for turn in prompts[index]))


def cannot_run(execution_provider: str) -> str | None:
    """Why a variant for `execution_provider` cannot run on this machine; None if it can."""
    if execution_provider == "cpu":
        return None
    if execution_provider == "cuda":
        import onnxruntime_genai as og

        return None if og.is_cuda_available() else "it is built for CUDA, and this machine has no GPU that is used here"
    return f"it is built for {execution_provider}, which no runtime here has"


def open_runtime(
    directory: Path, *, quantized: bool, dtype: str, num_threads: int, batch_size: int = 1
) -> TokenRuntime:
    """Load a Hugging Face directory with transformers, or a quantized variant with ONNX Runtime GenAI.

    The libraries are imported here, so that a process which serves a quantized variant never holds torch.

    Args:
        directory: the model.
        quantized: whether it is an ONNX Runtime GenAI directory.
        dtype: compute type of a Hugging Face directory: `auto`, `float32` or `bfloat16`.
        num_threads: threads of the runtime.
        batch_size: prompts answered together, where the runtime batches.

    Raises:
        ModelError: the directory cannot be loaded.
    """
    if quantized:
        from slmops.inference.genai import GenAIRuntime

        return GenAIRuntime(directory, num_threads=num_threads)
    from slmops.inference.torch_runtime import TorchRuntime

    return TorchRuntime(directory, dtype=dtype, num_threads=num_threads, batch_size=batch_size)
