"""Whether an answer survives the way over text."""

from __future__ import annotations

from typing import Protocol

from slmops.teachers.interface import Answer, Question


class Encode(Protocol):
    """A chat template and a tokenizer."""

    def __call__(self, messages: list[dict[str, str]], *, to_answer: bool) -> list[int]:
        """Tokens of a conversation; with `to_answer`, up to where the assistant's next turn begins."""


def retokenizes(encode: Encode, question: Question, answer: Answer) -> bool:
    """Whether the answer's text, put behind the prompt by the template, is the tokens that the teacher chose.

    If not, a student would learn from other tokens than the teacher meant, and kept logits would be about those.
    """
    messages = [dict(message) for message in question.messages]
    prompt = encode(messages, to_answer=True)
    whole = encode([*messages, {"role": "assistant", "content": answer.text}], to_answer=False)
    end = len(prompt) + len(answer.token_ids)
    return whole[: len(prompt)] == prompt and tuple(whole[len(prompt) : end]) == answer.token_ids
