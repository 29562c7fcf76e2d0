"""What every teacher takes and gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

Prompt = Sequence[Mapping[str, str]]
"""The turns of a conversation up to where the assistant answers: `role` and `content` each."""

STOP = "stop"
"""The finish reason of an answer that came to its end."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are found; with the teacher's identity it decides what a question's answer is."""

    max_new_tokens: int
    greedy: bool = True
    """The likeliest token; else drawn with temperature and top_p."""
    temperature: float = 1.0
    top_p: float = 1.0
    logits_top_k: int = 0
    """Log-probabilities kept per answer token by teachers that run here; 0 keeps none."""
    logits_temperature: float = 1.0
    """Temperature at which they are kept."""
    top_logprobs: int = 0
    """Alternatives per answer token asked of an endpoint; 0 asks for none."""


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt for one answer."""

    key: str
    """32 hex digits, see `question_key`: the same question has the same key in every run."""
    messages: tuple[Mapping[str, str], ...]
    seed: int
    """Of sampling. It belongs to the question, so that the answer depends on neither batch nor shard."""
    draft: str = ""
    """An answer that is worth trying first. It changes how fast a greedy answer is found, not which."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a teacher said, n tokens of it."""

    text: str
    finish_reason: str
    """`stop`, or why it ended before its end: `length`, `content_filter`."""
    model: str
    """What the teacher says that it is."""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    """[n] the end-of-turn token included; empty from an endpoint."""
    logits: np.ndarray | None = None
    """[n] records of `slmops.cached_logits`; None if none were asked for."""
    top_logprobs: tuple[Mapping[str, Any], ...] = ()
    """[n] as an endpoint gives them: `token`, `logprob`, `top_logprobs`; empty if it gives none."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A question without an answer, after all that could be tried."""

    reason: str
    """A word to count by: `timeout`, `empty`, `not_json`, `too_large`, `server_error`, `prompt_too_long`."""
    detail: str
    """What was found, for the log; never holds a key or a prompt."""


class Teacher(Protocol):
    """A model that answers."""

    name: str

    @property
    def identity(self) -> Mapping[str, str | int | float]:
        """What decides about its answers beside `Decoding`: digest or address, compute type, template."""

    def answer(self, questions: Iterable[Question]) -> Generator[tuple[Question, Answer | Failure]]:
        """Answer `questions`, in any order, as answers come; takes no more of them ahead than it works on.

        Raises:
            UserError: the teacher cannot be asked at all: wrong key, wrong model.
            TransientError: it does not answer any more.
        """

    def close(self) -> None:
        """Give back memory and connections."""


def question_key(messages: Prompt, decoding: Decoding, seed: int) -> str:
    """32 hex digits of the SHA-256 of what is asked; a greedy answer does not depend on the seed."""
    asked = json.dumps([list(map(dict, messages)), None if decoding.greedy else seed], sort_keys=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:32]
