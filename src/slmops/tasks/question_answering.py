"""question_answering: a question over a passage, answered in the passage's words."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from slmops.records import ChatRecord
from slmops.tasks.interface import Pairs, Task, instructed, mean, text_of
from slmops.tasks.overlap import ARTICLES, normalized, token_f1, words
from slmops.teachers.interface import Prompt

UNANSWERABLE = "unanswerable"
"""What is said if the passage does not hold the answer."""
PROMPT = "Passage:\n{passage}\n\nQuestion: {question}"
"""The form of prompts that slmops writes itself."""

_LEAD = re.compile(r"^\W*answer\W*:\s*", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "`": "`"}


class QuestionAnswering(Task):
    """The answer is a span of the passage, as in SQuAD (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250)."""

    passage_pattern: str = Field(default=r"(?s)Passage:\s*(.+)\n\s*Question:", min_length=1)
    """Regular expression whose group 1 is the passage in a prompt; where it is not found, the whole prompt is."""

    @field_validator("passage_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"passage_pattern is no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"passage_pattern must have one group, the passage, found {groups}")
        return pattern

    def ask(self, record: ChatRecord) -> Prompt:
        return instructed(
            record.prompt,
            "Answer with the shortest words of the passage that answer the question, copied exactly, and nothing else. "
            f"If the passage does not hold the answer, say: {UNANSWERABLE}",
        )

    def read(self, text: str, record: ChatRecord) -> str:
        answer = _LEAD.sub("", text.strip(), count=1).strip()
        if len(answer) > 2 and _QUOTES.get(answer[0]) == answer[-1]:
            answer = answer[1:-1].strip()
        return answer

    def check(self, completion: str, record: ChatRecord) -> str | None:
        if normalized(completion) == UNANSWERABLE:
            return None if normalized(record.completion) == UNANSWERABLE else UNANSWERABLE
        return None if grounded(completion, self.passage_of(record)) else "not_in_passage"

    def passage_of(self, record: ChatRecord) -> str:
        text = text_of(record)
        found = re.search(self.passage_pattern, text)
        return found[1] if found else text

    def correct(self, completion: str, reference: str) -> bool:
        return normalized(completion) == normalized(reference)

    def metrics(self, pairs: Pairs) -> dict[str, float]:
        """Exact match of the normalised texts, and F1 of their words."""
        return {
            "squad_exact_match": mean([float(self.correct(answer, reference)) for answer, reference in pairs]),
            "squad_f1": mean([token_f1(answer, reference) for answer, reference in pairs]),
        }


def grounded(quote: str, passage: str) -> bool:
    """Whether the words of `quote`, but for articles, stand in `passage` in this order, side by side.

    Punctuation parts words here, unlike in `normalized`: passages often lack the space behind a full stop.
    """
    said = _content(quote)
    return said.strip() != "" and said in _content(passage)


def _content(text: str) -> str:
    return f" {' '.join(word for word in words(text) if word not in ARTICLES)} "
