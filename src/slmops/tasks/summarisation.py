"""summarisation: chain of density, of which the last and densest summary is learned."""

from __future__ import annotations

import re

from pydantic import Field

from slmops.records import ChatRecord
from slmops.tasks.interface import Pairs, Rejected, Task, instructed, mean, text_of
from slmops.tasks.json_text import find_json
from slmops.tasks.overlap import rouge_l, words
from slmops.teachers.interface import Prompt

_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_NAME = re.compile(r"(?<![.!?:]\s)(?<![.!?:][\"”’)]\s)(?<!^)(?<![\n\"“‘(])\b[A-Z][\w'’-]+")


class Summarisation(Task):
    """Each step names entities that are missing, and fits them in at the same length.

    Adams et al. 2023, https://arxiv.org/abs/2309.04269.
    """

    num_steps: int = Field(default=5, ge=1, le=10)
    """Summaries that the teacher writes, each denser than the one before; the last is kept."""
    max_words: int = Field(default=80, ge=5, le=2000)
    """About how long the teacher is asked to write, in words."""
    max_new_entities: int = Field(default=0, ge=0, le=1000)
    """Names and numbers of a summary that its source does not have, from which on it counts as invented."""
    min_rouge_l: float = Field(default=0.3, ge=0, le=1)
    """ROUGE-L F1 from which on a summary counts as right beside its reference."""

    def ask(self, record: ChatRecord) -> Prompt:
        return instructed(
            record.prompt,
            f"Write {self.num_steps} summaries of the text above, one after the other, each of about {self.max_words} "
            "words. The first is general. For each further one, find one to three entities of the text (names, numbers "
            "or dates) that the summary before lacks, and rewrite it at the same length, with them and with all "
            "that it had. Each must be understood without the text. Answer with JSON only: a list of "
            f'{self.num_steps} objects, {{"missing_entities": "...", "denser_summary": "..."}}',
        )

    def read(self, text: str, record: ChatRecord) -> str:
        steps = find_json(text)
        last = steps[-1] if isinstance(steps, list) and steps else None
        summary = last.get("denser_summary") if isinstance(last, dict) else None
        if not isinstance(summary, str):
            raise Rejected("no_summary")
        return summary.strip()

    def check(self, completion: str, record: ChatRecord) -> str | None:
        source = text_of(record)
        if len(words(completion)) >= len(words(source)):
            return "not_shorter"
        return (
            "invented_entity"
            if len(entities(completion) - entities_of_source(source)) > self.max_new_entities
            else None
        )

    def correct(self, completion: str, reference: str) -> bool:
        return rouge_l(completion, reference) >= self.min_rouge_l

    def metrics(self, pairs: Pairs) -> dict[str, float]:
        return {"rouge_l": mean([rouge_l(answer, reference) for answer, reference in pairs])}


def entities(text: str) -> set[str]:
    """Numbers, and capitalised words within a sentence: what a reader would look up in the source."""
    return set(_NUMBER.findall(text)) | {_stem(name) for name in _NAME.findall(text)}


def entities_of_source(text: str) -> set[str]:
    """All words and numbers of a source, in the form of `entities`."""
    return set(_NUMBER.findall(text)) | {_stem(word) for word in re.findall(r"\b\w[\w'’-]*", text)}


def _stem(name: str) -> str:
    return name.casefold().replace("’", "'").removesuffix("'s").rstrip("'").removesuffix("s")
