"""Rows of a test with what models answered, to read beside the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    text: str
    correct: bool


@dataclass(frozen=True)
class Example:
    """One row of the test, with an answer by the name of each model; None for a model whose answer is not known."""

    prompt: str
    earlier_turns: int
    reference: str
    answers: Mapping[str, Answer | None]


def answer(prediction: Mapping[str, Any]) -> Answer:
    """The answer in a line of predictions.jsonl."""
    return Answer(str(prediction.get("prediction", "")), bool(prediction.get("correct")))


def example(prediction: Mapping[str, Any], answers: Mapping[str, Answer | None]) -> Example:
    """A line of predictions.jsonl as a row with `answers`."""
    turns = [str(turn.get("content", "")) for turn in prediction.get("prompt") or [] if turn.get("role") != "system"]
    prompt = turns[-1] if turns else ""
    return Example(prompt, max(0, len(turns) - 1), str(prediction.get("reference", "")), answers)
