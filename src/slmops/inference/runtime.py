"""One interface over the runtimes that a model can run on."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slmops.inference.executorch_files import is_executorch
from slmops.records import ChatRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

Prompt = Sequence[dict[str, str]]
"""The turns of a conversation up to where the assistant answers."""


class Runtime(Protocol):
    """A loaded model. Decoding is greedy and ends at the model's end of turn."""

    name: str
    """Library and version, such as `onnxruntime-genai 0.18.0`, and what else there is to say in brackets."""

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


class ScoringRuntime(Protocol):
    """What `encode_row` and `answer_losses` ask of a runtime that scores one row at a time."""

    @property
    def end_tokens(self) -> Collection[int]:
        """Each ends a turn."""

    def encode_messages(self, messages: Prompt, *, to_answer: bool) -> list[int]:
        """Token ids of a conversation; with `to_answer`, up to where the assistant's next turn begins."""

    def log_likelihoods(self, ids: Sequence[int], num_scored: int) -> tuple[list[float], bool]:
        """Log-probabilities in nats of the last `num_scored` of `ids`, and whether each token was the likeliest."""


def encode_row(runtime: ScoringRuntime, record: ChatRecord) -> tuple[list[int], int]:
    """`TokenRuntime.encode_row`: what templates add behind the end of a turn is left out."""
    prompt = runtime.encode_messages(record.prompt, to_answer=True)
    ids = runtime.encode_messages([message.model_dump() for message in record.messages], to_answer=False)
    ends = [at for at in range(len(prompt), len(ids)) if ids[at] in runtime.end_tokens]
    return ids[: ends[0] + 1] if ends else ids, len(prompt)


def answer_losses(runtime: ScoringRuntime, records: Sequence[ChatRecord]) -> list[tuple[float, int]]:
    """`Runtime.answer_losses`, a row after the other."""
    losses = []
    for record in records:
        ids, num_prompt = encode_row(runtime, record)
        log_probs, _ = runtime.log_likelihoods(ids, len(ids) - num_prompt)
        losses.append((-sum(log_probs), len(log_probs)))
    return losses


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
    """Load a Hugging Face directory with transformers, or a quantized variant with the runtime that it is for.

    The libraries are imported here, so that a process which serves a quantized variant never holds torch.

    Args:
        directory: the model.
        quantized: whether it is a variant that quantize wrote, for ONNX Runtime or ExecuTorch.
        dtype: compute type of a Hugging Face directory: `auto`, `float32` or `bfloat16`.
        num_threads: threads of the runtime.
        batch_size: prompts answered together, where the runtime batches.

    Raises:
        ModelError: the directory cannot be loaded.
    """
    if quantized and is_executorch(directory):
        from slmops.inference.executorch_runtime import ExecuTorchRuntime

        return ExecuTorchRuntime(directory, num_threads=num_threads)
    if quantized:
        from slmops.inference.batched import BatchedRuntime
        from slmops.inference.genai import GenAIRuntime
        from slmops.inference.slots import NoSlotsError

        try:
            return BatchedRuntime(directory, num_threads=num_threads, num_slots=batch_size)
        except NoSlotsError:
            return GenAIRuntime(directory, num_threads=num_threads)
    from slmops.inference.torch_runtime import TorchRuntime

    return TorchRuntime(directory, dtype=dtype, num_threads=num_threads, batch_size=batch_size)
