"""generate_responses: one or several teachers answer the prompts of a data set.

The prompts are streamed once for each teacher, to be asked, and once more to be written. Between the two, answers lie
in a cache, which is also what a killed run goes on from, and what makes an answer free for whoever asks the same again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from slmops import artifacts, models, storage
from slmops.artifacts import Draft, Sidecar
from slmops.errors import ConfigError, DataError, TransientError
from slmops.generate_responses.choosing import Choosing, Dropped, Kept
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.generate_responses.output import Output
from slmops.progress import Progress, log
from slmops.records import ChatRecord, stream_records
from slmops.resume import work_root
from slmops.teachers.cache import AnswerCache
from slmops.teachers.config import INPUT, TeacherSpec
from slmops.teachers.interface import Decoding, Question
from slmops.teachers.mixture import Mixture
from slmops.teachers.open import ask, budget_of, open_teacher

STEP = "generate_responses"
ANSWERS = "answers"
"""Name of the cache's folder where steps keep their work."""
PERMANENT = {"prompt_too_long"}
"""Failures that trying again does not change."""


def run(config: GenerateResponsesConfig, *, prompts: Path, teacher: Path | None, responses: Path) -> Sidecar:
    """Answer each prompt of the shard, and write the answers that a student can learn from.

    An answer that came is kept whatever happens after it, and is not asked for again by this or another run.

    Args:
        prompts: Chat records; their last turn is not shown to a teacher.
        teacher: The model directory that `model_uri=input` means; None if there is none.
        responses: The artifact to write.

    Raises:
        ArtifactError: an input is missing or half-written.
        ModelError: a teacher cannot be loaded.
        ConfigError: there is no model where one is needed, or a task is unknown.
        DataError: no answer is left.
        UserError: an endpoint refuses, or the budget is used up.
        TransientError: an endpoint does not answer, or too many prompts got no answer.
    """
    source = artifacts.expect(prompts, "chat_dataset")
    with ExitStack() as stack:
        directories = _fetch_models(config, teacher, responses, stack)
        parents = [
            source,
            *(_sidecar(spec, directories[spec.name]) for spec in config.teachers() if spec.name in directories),
        ]
        session = Session(config, Prompts.of_shard(config, prompts, source), directories, work_root(responses), stack)
        with artifacts.writing(responses, kind="responses", step=STEP, config=config, parents=parents) as draft:
            started = time.monotonic()
            session.ask_teachers()
            session.ask_judge()
            seconds = time.monotonic() - started
            session.check()
            _write(draft, session)
            if session.num_asked:
                draft.facts["tokens_per_s"] = round(session.num_tokens / seconds, 1)
    return draft.sidecar


@dataclass(frozen=True)
class Prompts:
    """The prompts of one shard, read anew each time."""

    dataset: Path
    start: int
    stop: int

    @classmethod
    def of_shard(cls, config: GenerateResponsesConfig, dataset: Path, sidecar: Sidecar) -> Prompts:
        num_rows = min(int(sidecar.facts["num_rows"]), config.max_rows)
        start, stop = (num_rows * number // config.num_shards for number in (config.shard, config.shard + 1))
        return cls(dataset, start, stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[ChatRecord]:
        return islice(stream_records(self.dataset), self.start, self.stop)


class Session:
    """Teachers, what they were asked, and where their answers lie."""

    def __init__(
        self,
        config: GenerateResponsesConfig,
        prompts: Prompts,
        directories: Mapping[str, Path],
        work: Path,
        stack: ExitStack,
    ) -> None:
        self.config, self.prompts, self.directories = config, prompts, directories
        self.choosing = Choosing(config)
        self.num_asked = self.num_tokens = 0
        self.identity: Mapping[str, str | int | float] = {}
        """Of the teachers whose logits are kept; they have one tokenizer and one template."""
        self.model: Path | None = None
        """The directory of one of them; None if no logits are kept."""
        self._failures: Counter[str] = Counter()
        self._work, self._stack = work / ANSWERS, stack
        self._specs = {spec.name: spec for spec in config.teachers()}
        self._mixture = Mixture(config.teachers(), config.seed)
        self._budget = budget_of(config)
        self._answers: dict[str, AnswerCache] = {}
        self._verdicts: AnswerCache | None = None

    def ask_teachers(self) -> None:
        """One teacher after the other, so that only one model is in memory."""
        for spec in self._specs.values():
            if spec.weight:
                questions = (
                    question
                    for record in self.prompts
                    if self._mixture.teacher_of(record) == spec.name
                    for question in self.choosing.questions(record)
                )
                self._answers[spec.name] = self._ask(spec, self.choosing.decoding, questions)

    def ask_judge(self) -> None:
        """Let the judge rate the answers of each prompt that has several good ones."""
        if self.config.choose_by == "judge":
            questions = (
                question
                for record in self.prompts
                for question in self.choosing.judge_questions(record, self._answers_to(record))
            )
            self._verdicts = self._ask(self._specs[self.config.judge], self.choosing.judging, questions)

    def check(self) -> None:
        """Whether enough prompts have an answer.

        Raises:
            TransientError: too many were asked in vain, and trying again may help.
            DataError: it does not.
        """
        missing = sum(
            not any(question.key in self._answers_to(record) for question in self.choosing.questions(record))
            for record in self.prompts
        )
        if missing <= (1 - self.config.min_success_fraction) * len(self.prompts):
            return
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self._failures.most_common())
        message = (
            f"{missing:,} of {len(self.prompts):,} prompts have no answer ({reasons}), more than "
            f"min_success_fraction={self.config.min_success_fraction:g} allows; the other answers are kept"
        )
        if set(self._failures) <= PERMANENT:
            raise DataError(f"{message}; lower min_success_fraction, or take these prompts out")
        raise TransientError(f"{message}: run the same again to ask for the missing ones only")

    def choose(self, record: ChatRecord) -> Kept | Dropped:
        """What is learned from `record`."""
        return self.choosing.choose(record, self._answers_to(record), self._verdicts)

    def _answers_to(self, record: ChatRecord) -> AnswerCache:
        return self._answers[self._mixture.teacher_of(record)]

    def _ask(self, spec: TeacherSpec, decoding: Decoding, questions: Iterable[Question]) -> AnswerCache:
        directory = self.directories.get(spec.name)
        with open_teacher(spec, decoding, self.config, directory=directory, budget=self._budget) as teacher:
            if decoding.logits_top_k:
                self._check_tokenizer(teacher.identity, directory)
            answers = self._stack.enter_context(AnswerCache(self._work, teacher.identity, decoding))
            if len(answers):
                log.info("%s gave %s answers before, which are not asked again", spec.name, f"{len(answers):,}")
            with Progress(f"{STEP} {spec.name}", len(self.prompts) * self.config.num_samples) as progress:
                asked = ask(teacher, answers, questions, progress)
        self.num_asked += asked.num_answers
        self.num_tokens += asked.num_tokens
        self._failures += asked.failures
        return answers

    def _check_tokenizer(self, identity: Mapping[str, str | int | float], directory: Path | None) -> None:
        before, self.model = self.identity, directory
        for name in ("tokenizer", "template"):
            if before.get(name, identity[name]) != identity[name]:
                raise ConfigError(
                    f"the teachers differ in their {name}, so their logits are not about the same tokens; use "
                    "logits_top_k=0, or teachers of one family"
                )
        self.identity = {**identity, "model": "+".join(str(known["model"]) for known in (before, identity) if known)}


def _fetch_models(
    config: GenerateResponsesConfig, teacher: Path | None, responses: Path, stack: ExitStack
) -> dict[str, Path]:
    """Where each teacher's model lies, by the teacher's name; models that are far away are fetched first."""
    directories: dict[str, Path] = {}
    for spec in config.teachers():
        if spec.kind == "endpoint":
            continue
        if spec.model_uri != INPUT:
            responses.parent.mkdir(parents=True, exist_ok=True)
            copy = stack.enter_context(TemporaryDirectory(prefix=f"{STEP}-", dir=responses.parent))
            directories[spec.name] = storage.fetch_directory(spec.model_uri, Path(copy))
        elif teacher is not None:
            directories[spec.name] = teacher
        elif spec.weight or config.judge == spec.name:
            raise ConfigError(
                f"{spec.name} of kind {spec.kind} needs a model; give the step a teacher or a model_uri, or use "
                "teacher_kind=endpoint"
            )
    return directories


def _sidecar(spec: TeacherSpec, directory: Path) -> Sidecar:
    return models.open_variant(directory) if spec.kind == "genai" else models.open_model(directory)


def _write(draft: Draft, session: Session) -> None:
    """Write what a student can learn from, in the order of the prompts, and count the rest by reason.

    Raises:
        DataError: nothing is left; of several shards, the merged whole decides.
    """
    config, num_prompts = session.config, len(session.prompts)
    dropped: Counter[str] = Counter()
    with Output(draft.path, config, session.identity, session.model) as output:
        for record in session.prompts:
            found = session.choose(record)
            if isinstance(found, Dropped):
                dropped[found.reason] += 1
            elif not output.write(found.row, found.answer):
                dropped["ambiguous"] += 1
    if dropped:
        counts = dict(dropped.most_common())
        log.info("%s of %s prompts left out: %s", f"{dropped.total():,}", f"{num_prompts:,}", counts)
    if not output.num_rows and config.num_shards == 1:
        raise no_usable_answer(num_prompts, dropped)
    draft.facts |= output.facts() | {
        "num_prompts": num_prompts,
        "num_dropped": dropped.total(),
        "dropped": dict(sorted(dropped.items())),
        "num_asked": session.num_asked,
    }
    if config.num_shards > 1:
        draft.facts |= {"shard": config.shard, "num_shards": config.num_shards}


def no_usable_answer(num_prompts: int, dropped: Mapping[str, int]) -> DataError:
    """The error for teachers from whom nothing can be learned."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
    return DataError(
        f"no usable answer to {num_prompts:,} prompts ({reasons}); raise max_new_tokens if they are truncated, loosen "
        "the checks if they drop what is good, or fine-tune the teacher first"
    )
