"""What every task says: prompt, parsing, check, metric."""

from __future__ import annotations

from collections.abc import Sequence

from slmops.config import Config
from slmops.records import ChatRecord
from slmops.tasks.overlap import rouge_l
from slmops.teachers.interface import Prompt

Pairs = Sequence[tuple[str, str]]
"""Answers, each with its reference."""


class Rejected(Exception):
    """An answer that nobody should learn from."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        """A word to count by, such as `no_label`."""


class Task(Config):
    """A task with its settings, which are its fields. What it does not say is as in a plain conversation.

    The student's prompt is always the record's own; what `ask` adds is for the teacher alone.
    """

    def ask(self, record: ChatRecord) -> Prompt:
        """What the teacher is asked.

        Raises:
            ConfigError: the task cannot be asked as it is set; said before anything is paid.
        """
        return record.prompt

    def read(self, text: str, record: ChatRecord) -> str:
        """What the student learns to say, from the teacher's `text`.

        Raises:
            Rejected: there is no such thing in it.
        """
        return text.strip()

    def check(self, completion: str, record: ChatRecord) -> str | None:
        """Why `completion`, though readable, is no good answer to `record`; None if it may be one."""
        return None

    def parse(self, text: str, record: ChatRecord) -> str:
        """`read`, then `check`.

        Raises:
            Rejected: with the reason of either.
        """
        completion = self.read(text, record)
        if not completion.strip():
            raise Rejected("empty")
        if reason := self.check(completion, record):
            raise Rejected(reason)
        return completion

    def correct(self, completion: str, reference: str) -> bool:
        """Whether both say the same. Also what a vote among several answers counts by."""
        return completion.strip() == reference.strip()

    def metrics(self, pairs: Pairs) -> dict[str, float]:
        """Figures from 0 to 1 over answers (as a model gave them) and references, at least one pair."""
        return {"rouge_l": mean([rouge_l(answer, reference) for answer, reference in pairs])}


def instructed(prompt: Prompt, instruction: str) -> Prompt:
    """`prompt` with `instruction` below its last user turn: not every chat template knows a system turn."""
    turns = [dict(turn) for turn in prompt]
    last = max(number for number, turn in enumerate(turns) if turn["role"] == "user")
    turns[last]["content"] = f"{turns[last]['content'].rstrip()}\n\n{instruction}"
    return turns


def text_of(record: ChatRecord) -> str:
    """All that the user and the system said."""
    return "\n\n".join(turn.content for turn in record.messages[:-1] if turn.role != "assistant")


def mean(figures: Sequence[float]) -> float:
    return sum(figures) / len(figures)
