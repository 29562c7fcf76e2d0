"""nli: whether one text follows from another."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from slmops.records import ChatRecord
from slmops.tasks.classification import Classification
from slmops.tasks.interface import instructed
from slmops.teachers.interface import Prompt

MEANINGS = {
    "entailment": "the second text follows from the first",
    "neutral": "it may or may not be true, given the first",
    "contradiction": "it cannot be true, given the first",
}
"""The labels of natural language inference (Bowman et al. 2015, https://arxiv.org/abs/1508.05326)."""


class NLI(Classification):
    """Natural language inference: classification of a pair of texts, both in the prompt."""

    labels: list[Annotated[str, Field(min_length=1)]] = Field(default=list(MEANINGS))
    """The labels; others than the usual three are asked for without an explanation."""

    def ask(self, record: ChatRecord) -> Prompt:
        if set(self.labels) != set(MEANINGS):
            return super().ask(record)
        meanings = "\n".join(f"{label}: {MEANINGS[label]}" for label in self.labels)
        return instructed(record.prompt, f"Answer with exactly one of these words and nothing else:\n{meanings}")
