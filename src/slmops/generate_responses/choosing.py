"""What is asked about a prompt, and which of the answers a student learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from slmops.checks import Checks
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.records import ChatRecord, Message, Provenance
from slmops.tasks.interface import Rejected
from slmops.tasks.registry import Tasks
from slmops.teachers.cache import AnswerCache
from slmops.teachers.interface import STOP, Answer, Decoding, Prompt, Question, question_key
from slmops.teachers.selection import choose, judge_question, read_score

JUDGE_TOKENS = 512
"""Longest verdict of a judge: some think aloud before they say a number."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The answer that a prompt keeps."""

    row: ChatRecord
    """The prompt with what the task made of the answer."""
    answer: Answer


@dataclass(frozen=True, slots=True)
class Dropped:
    """A prompt that is left out."""

    reason: str
    """A word to count by."""


class Choosing:
    """Questions about prompts, and the choice among their answers."""

    def __init__(self, config: GenerateResponsesConfig) -> None:
        self.config = config
        self.tasks = Tasks(config.task_settings)
        self.checks = Checks(config, config.min_agreement_fraction)
        self.decoding = Decoding(
            max_new_tokens=config.max_new_tokens,
            greedy=config.decoding == "greedy",
            temperature=config.temperature,
            top_p=config.top_p,
            logits_top_k=config.logits_top_k,
            logits_temperature=config.logits_temperature,
            top_logprobs=config.top_logprobs,
        )
        self.judging = Decoding(max_new_tokens=JUDGE_TOKENS)

    def questions(self, record: ChatRecord) -> list[Question]:
        """One question for each sample."""
        messages = tuple(self.tasks.of(record).ask(record))
        seeds = [_seed(self.config.seed, number, messages) for number in range(self.config.num_samples)]
        draft = record.completion if self.decoding.greedy else ""
        return [Question(question_key(messages, self.decoding, seed), messages, seed, draft) for seed in seeds]

    def judge_questions(self, record: ChatRecord, answers: AnswerCache) -> Iterator[Question]:
        """A question about each answer that passes the checks, if there are several to choose from."""
        texts = {text for text in self._completions(record, self._answers(record, answers)) if isinstance(text, str)}
        if len(texts) > 1:
            yield from (self._judge_question(record, text) for text in sorted(texts))

    def choose(self, record: ChatRecord, answers: AnswerCache, verdicts: AnswerCache | None) -> Kept | Dropped:
        """The answer that is kept, or why none is."""
        given = self._answers(record, answers)
        found = self._completions(record, given)
        completions = [text if isinstance(text, str) else None for text in found]
        method = self.config.choose_by
        distinct = {text for text in completions if text is not None}
        if method == "judge" and len(distinct) == 1:
            method = "first"  # nothing to judge
        scores = [self._score(record, text, verdicts) for text in completions] if method == "judge" else []
        choice = choose(method, completions, correct=self.tasks.of(record).correct, scores=scores)
        if choice is None:
            rejected = [reason.reason for reason in found if isinstance(reason, Dropped)]
            return Dropped(rejected[0] if not distinct else "no_verdict")
        completion, answer = (
            str(completions[choice.index]),
            cast(Answer, given[choice.index]),
        )  # a choice is one of them
        if reason := self.checks.reason(record, completion, choice.agreement):
            return Dropped(reason)
        return Kept(_row(record, completion, answer), answer)

    def _answers(self, record: ChatRecord, answers: AnswerCache) -> list[Answer | None]:
        return [answers.get(question.key) for question in self.questions(record)]

    def _completions(self, record: ChatRecord, answers: list[Answer | None]) -> list[str | Dropped]:
        """What the student would learn from each answer, or why it cannot."""
        return [self._completion(record, answer) for answer in answers]

    def _completion(self, record: ChatRecord, answer: Answer | None) -> str | Dropped:
        if answer is None:
            return Dropped("no_answer")
        if answer.finish_reason != STOP:
            return Dropped("truncated" if answer.finish_reason == "length" else answer.finish_reason)
        try:
            completion = self.tasks.of(record).parse(answer.text, record)
        except Rejected as rejected:
            return Dropped(rejected.reason)
        reason = self.checks.reason(record, completion)
        return Dropped(reason) if reason else completion

    def _judge_question(self, record: ChatRecord, completion: str) -> Question:
        return judge_question(record, completion, self.judging, seed=self.config.seed)

    def _score(self, record: ChatRecord, completion: str | None, verdicts: AnswerCache | None) -> int | None:
        if completion is None or verdicts is None:
            return None
        verdict = verdicts.get(self._judge_question(record, completion).key)
        return read_score(verdict.text) if verdict else None


def _row(record: ChatRecord, completion: str, answer: Answer) -> ChatRecord:
    kept = record.provenance  # of a synthetic prompt: who wrote it stays known
    provenance = Provenance(
        teacher=answer.model, method=kept.method if kept else "answer", sources=kept.sources if kept else ()
    )
    messages = (*record.messages[:-1], Message(role="assistant", content=completion))
    return record.model_copy(update={"messages": messages, "provenance": provenance})


def _seed(seed: int, number: int, messages: Prompt) -> int:
    """Below 2**31, which every server takes; another one for each prompt and sample."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{messages}".encode()).digest()[:4], "big") >> 1
