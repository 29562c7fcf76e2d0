"""Opening a teacher by its settings, and asking it only what nobody was told before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path

from slmops.errors import ConfigError
from slmops.progress import Progress, log
from slmops.teachers.budget import Budget
from slmops.teachers.cache import AnswerCache
from slmops.teachers.config import TeacherSettings, TeacherSpec
from slmops.teachers.interface import Answer, Decoding, Question, Teacher


def budget_of(settings: TeacherSettings) -> Budget:
    """What all endpoints of a step may cost together."""
    priced = settings.prompt_price or settings.completion_price
    return Budget(
        settings.max_total_tokens,
        settings.max_cost if priced else None,
        settings.prompt_price,
        settings.completion_price,
    )


def open_teacher(
    spec: TeacherSpec, decoding: Decoding, settings: TeacherSettings, *, directory: Path | None, budget: Budget
) -> AbstractContextManager[Teacher]:
    """The teacher of `spec`, ready to answer; leaving the context gives back what it holds.

    Args:
        directory: Its model directory; None for an endpoint.
        budget: Of the endpoints of the step; see `budget_of`.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: a setting does not fit this kind of teacher, or its library is not installed.
    """
    return closing(_open(spec, decoding, settings, directory, budget))


def _open(
    spec: TeacherSpec, decoding: Decoding, settings: TeacherSettings, directory: Path | None, budget: Budget
) -> Teacher:
    # Imported here: each kind brings a library of its own, which need not be installed for the others.
    if spec.kind == "endpoint":
        from slmops.teachers.connection import read_key
        from slmops.teachers.endpoint import EndpointTeacher

        return EndpointTeacher(
            spec.name,
            decoding,
            url=spec.endpoint_url,
            model=spec.endpoint_model,
            api=spec.endpoint_api,
            key=read_key(),
            max_in_flight=settings.max_in_flight,
            timeout_s=settings.request_timeout_s,
            max_retries=settings.max_retries,
            budget=budget,
        )
    if directory is None:
        raise ConfigError(f"teacher {spec.name} of kind {spec.kind} needs a model directory; give the step a teacher")
    if spec.kind == "genai":
        from slmops.teachers.genai_teacher import GenAITeacher

        return GenAITeacher(spec.name, decoding, directory=directory, batch_size=settings.batch_size)
    if spec.kind == "vllm":
        from slmops.teachers.vllm_teacher import VLLMTeacher

        return VLLMTeacher(spec.name, decoding, directory=directory, dtype=settings.dtype)
    from slmops.teachers.transformers_teacher import TransformersTeacher

    return TransformersTeacher(
        spec.name, decoding, directory=directory, batch_size=settings.batch_size, dtype=settings.dtype
    )


@dataclass
class Asked:
    """What asking took."""

    num_answers: int = 0
    """New ones."""
    num_tokens: int = 0
    """Of new answers."""
    failures: Counter[str] = field(default_factory=Counter)
    """Questions that stayed without an answer, by reason."""


def ask(teacher: Teacher, cache: AnswerCache, questions: Iterable[Question], progress: Progress) -> Asked:
    """Ask what `cache` does not hold, and put each answer there as it comes.

    Raises:
        UserError, TransientError: the teacher cannot be asked at all, or not any more; what it said is kept.
    """
    asked = Asked()
    on_their_way: set[str] = set()

    def missing() -> Iterator[Question]:
        for question in questions:
            if question.key in cache or question.key in on_their_way:
                progress.advance()
            else:
                on_their_way.add(question.key)
                yield question

    # Closed at once if this fails (a full disk, say): else what is on its way goes on being sent, and paid.
    answers = teacher.answer(missing())
    with closing(answers):
        for question, answer in answers:
            on_their_way.remove(question.key)
            if isinstance(answer, Answer):
                cache.put(question.key, answer)
                asked.num_answers += 1
                asked.num_tokens += answer.num_tokens
            else:
                if answer.reason not in asked.failures:
                    log.warning("no answer from %s: %s: %s", teacher.name, answer.reason, answer.detail)
                asked.failures[answer.reason] += 1
            progress.advance()
    return asked
