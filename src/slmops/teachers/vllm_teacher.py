"""A Hugging Face directory as a teacher, run in this process by vLLM, on machines with GPUs.

Prompts go to vLLM as tokens of our own template and tokenizer, and answers come back as tokens, so that rows and kept
logits mean the same whichever teacher made them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from slmops import models, torch_models
from slmops.cached_logits import record_dtype
from slmops.errors import ConfigError, ModelError
from slmops.teachers.interface import STOP, Answer, Decoding, Failure, Question
from slmops.training.batches import encode

if TYPE_CHECKING:
    import numpy as np

QUESTIONS_AHEAD = 2048
"""Questions given to vLLM at once: it fills the GPU from these itself."""


class VLLMTeacher:
    """Any causal language model that vLLM serves."""

    def __init__(self, name: str, decoding: Decoding, *, directory: Path, dtype: str) -> None:
        """Load the model.

        Raises:
            ConfigError: vLLM is not installed, or it cannot keep logits as asked.
            ArtifactError, ModelError: the model cannot be loaded, or has no chat template.
        """
        if decoding.logits_top_k and decoding.logits_temperature != 1.0:
            raise ConfigError(
                f"vLLM gives log-probabilities at temperature 1, got logits_temperature={decoding.logits_temperature}; "
                "set it to 1, or use teacher_kind=model"
            )
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"teacher {name} is of kind vllm, and vLLM cannot be imported ({error}); install it beside slmops on a "
                "machine with a GPU (pip install vllm), serve the model and use teacher_kind=endpoint, or use "
                "teacher_kind=model"
            ) from None
        self._vllm: Any = vllm
        self.name, self.decoding = name, decoding
        sidecar = models.open_model(directory)
        config = models.read_config(directory)
        self.tokenizer = torch_models.load_tokenizer(directory)
        try:
            self._llm: Any = vllm.LLM(
                model=str(directory),
                dtype=dtype,
                max_logprobs=max(decoding.logits_top_k, 1),
                logprobs_mode="raw_logprobs",  # of the model itself: before temperature and top_p
                trust_remote_code=False,
            )
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"{directory} cannot be loaded by vLLM {vllm.__version__}: {error}") from error
        self.context_length = int(config.get("max_position_embeddings") or 1 << 30)
        self.identity: Mapping[str, str | int | float] = {
            "kind": "vllm",
            "model": sidecar.digest,
            "dtype": f"{dtype}, vllm {vllm.__version__}",
            "tokenizer": models.tokenizer_digest(directory),
            "template": models.template_digest(directory),
        }
        self._says = f"{sidecar.facts.get('source', directory.name)}@{sidecar.digest[:12]}"

    def answer(self, questions: Iterable[Question]) -> Generator[tuple[Question, Answer | Failure]]:
        """See `slmops.teachers.interface.Teacher`."""
        remaining = iter(questions)
        while window := list(islice(remaining, QUESTIONS_AHEAD)):
            asked: list[tuple[Question, list[int]]] = []
            for question in window:
                ids = encode(self.tokenizer, [dict(message) for message in question.messages], to_answer=True)
                if len(ids) >= self.context_length:
                    yield (
                        question,
                        Failure("prompt_too_long", f"{len(ids)} tokens, the model reads {self.context_length}"),
                    )
                else:
                    asked.append((question, ids))
            outputs = self._llm.generate(
                [{"prompt_token_ids": ids} for _, ids in asked],
                [self._parameters(question, len(ids)) for question, ids in asked],
                use_tqdm=False,
            )
            for (question, ids), output in zip(asked, outputs, strict=True):
                yield question, self._answer(ids, output.outputs[0])

    def close(self) -> None:
        """Give the memory back."""
        self._llm = None
        gc.collect()

    def _parameters(self, question: Question, num_prompt_tokens: int) -> Any:
        decoding = self.decoding
        return self._vllm.SamplingParams(
            temperature=0.0 if decoding.greedy else decoding.temperature,
            top_p=1.0 if decoding.greedy else decoding.top_p,
            max_tokens=min(decoding.max_new_tokens, self.context_length - num_prompt_tokens),
            seed=None if decoding.greedy else question.seed,
            logprobs=decoding.logits_top_k or None,
            detokenize=False,
        )

    def _answer(self, prompt: Sequence[int], completion: Any) -> Answer | Failure:
        """From vLLM's CompletionOutput; its tokens include the one that ended the answer."""
        tokens = tuple(int(token) for token in completion.token_ids)
        if not tokens or completion.finish_reason not in {STOP, "length"}:
            return Failure("empty", f"vLLM ended the answer with {completion.finish_reason}")
        records = None
        if self.decoding.logits_top_k:
            records = records_of(completion.logprobs, self.decoding.logits_top_k)
        return Answer(
            text=cast(str, self.tokenizer.decode(list(tokens), skip_special_tokens=True)),
            finish_reason=completion.finish_reason,
            model=self._says,
            num_prompt_tokens=len(prompt),
            num_tokens=len(tokens),
            token_ids=tokens,
            logits=records,
        )


def records_of(positions: Sequence[Mapping[int, Any]], k: int) -> np.ndarray:
    """[n] records of vLLM's log-probabilities of n tokens.

    vLLM gives a mapping from token to `Logprob` for each position: the k likeliest, and the chosen token if it is not
    among them, which is left out here.
    """
    import numpy as np

    records = np.empty(len(positions), dtype=record_dtype(k))
    for record, found in zip(records, positions, strict=True):
        likeliest = sorted(found.items(), key=lambda item: -item[1].logprob)[:k]
        log_probs = [float(entry.logprob) for _, entry in likeliest]
        record["top_ids"] = [token for token, _ in likeliest]
        record["top_log_probs"] = log_probs
        mass = math.fsum(math.exp(value) for value in log_probs)
        record["tail_log_prob"] = math.log1p(-mass) if mass < 1 else -math.inf
    return records
