"""synthesize: a teacher writes prompts, from seeds or from documents, and answers them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from slmops import artifacts, models
from slmops.artifacts import Sidecar
from slmops.checks import Checks
from slmops.errors import ConfigError, DataError, TransientError
from slmops.progress import Progress, log
from slmops.records import ROWS, ChatRecord, stream_records, write_jsonl
from slmops.resume import work_dir, work_root
from slmops.storage import fetch, fetch_directory
from slmops.synthesize.asking import Desk, Request
from slmops.synthesize.config import SynthesizeConfig
from slmops.synthesize.documents import ENDINGS, read_documents
from slmops.synthesize.from_documents import from_documents
from slmops.synthesize.self_instruct import self_instruct
from slmops.tasks.registry import Tasks
from slmops.teachers.cache import AnswerCache
from slmops.teachers.config import INPUT, TeacherSpec
from slmops.teachers.interface import Answer, Decoding, Question, Teacher, question_key
from slmops.teachers.mixture import Mixture
from slmops.teachers.open import ask, budget_of, open_teacher

STEP = "synthesize"
ANSWERS = "answers"
"""Where answers are kept, below the directory of work that outlives a step."""

Opened = Mapping[str, tuple[Teacher, AnswerCache]]
"""Teachers by name, each with the answers that it gave before."""


def run(config: SynthesizeConfig, *, seeds: Path | None, teacher: Path | None, rows: Path) -> Sidecar:
    """Write up to `num_rows` new chat records to `rows`.

    After a kill the same questions are asked again, and those that were answered are taken from the cache.

    Raises:
        ArtifactError: an input is missing or half-written.
        ConfigError: an input or a setting is missing that the method or a teacher needs.
        DataError: seeds or documents are unusable, or no row is left.
        ModelError: a teacher cannot be loaded.
        UserError, TransientError: an endpoint refuses, does not answer, or its budget is used up.
    """
    if (seeds is None) != (config.method == "documents"):
        wrong = "needs seeds: a dataset of chat records" if seeds is None else "takes no seeds, but documents_uri"
        raise ConfigError(f"method={config.method} {wrong}")
    parents = [artifacts.expect(seeds, "chat_dataset", "responses")] if seeds else []
    parents += [models.open_model(teacher)] if teacher else []
    unfinished = work_dir(STEP, config, parents, rows)
    tasks, checks, mixture = Tasks(config.task_settings), Checks(config), Mixture(config.teachers(), config.seed)
    with artifacts.writing(rows, kind="chat_dataset", step=STEP, config=config, parents=parents) as draft:
        with ExitStack() as stack:
            drops: Counter[str] = Counter()
            opened = _open_all(config, teacher, unfinished, work_root(rows) / ANSWERS, stack)
            desk = Desk(Asking(opened, _decoding(config), drops), mixture, tasks, checks, drops)
            made = _rows(config, seeds, unfinished, desk)
            num_rows = write_jsonl(draft.path / ROWS, _followed(made, config.num_rows, desk))
        _report(config, num_rows, desk)
        draft.facts |= facts(num_rows, desk)
    shutil.rmtree(unfinished)
    return draft.sidecar


class Asking:
    """Asks each teacher what it did not answer before, and counts what stays without an answer."""

    def __init__(self, opened: Opened, decoding: Decoding, drops: Counter[str]) -> None:
        self._opened, self._decoding, self._drops = opened, decoding, drops

    def __call__(self, requests: Sequence[Request]) -> list[Answer | None]:
        """Answers in the order of `requests`, None where there is none.

        Raises:
            TransientError: there is not one.
        """
        questions = [
            Question(question_key(request.messages, self._decoding, request.seed), request.messages, request.seed)
            for request in requests
        ]
        failures: Counter[str] = Counter()
        for name, (teacher, cache) in self._opened.items():
            asked = [question for question, request in zip(questions, requests, strict=True) if request.teacher == name]
            with Progress(f"{STEP}: {name}", len(asked), "questions") as progress:
                failures += ask(teacher, cache, asked, progress).failures
        answers = [
            self._opened[request.teacher][1].get(question.key)
            for question, request in zip(questions, requests, strict=True)
        ]
        if requests and not any(answers):
            reasons = ", ".join(f"{reason} {count}" for reason, count in failures.items()) or "damaged answers"
            raise TransientError(f"not one of {len(requests)} questions was answered ({reasons}); try again later")
        self._drops.update({f"no_answer_{reason}": count for reason, count in failures.items()})
        return answers


def facts(num_rows: int, desk: Desk) -> dict[str, int]:
    """How many rows and requests, and how many were dropped, by reason."""
    drops = {f"num_dropped_{reason}": count for reason, count in sorted(desk.drops.items())}
    return {"num_rows": num_rows, "num_requests": desk.num_requests, **drops}


def _rows(config: SynthesizeConfig, seeds: Path | None, unfinished: Path, desk: Desk) -> Iterator[ChatRecord]:
    if seeds is not None:
        return self_instruct(config, islice(stream_records(seeds), config.max_seeds), desk)
    documents = _fetch_documents(config.documents_uri, unfinished / "documents")
    return from_documents(config, read_documents(documents, config.text_field), desk)


def _fetch_documents(uri: str, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return fetch(uri, directory) if uri.lower().endswith(ENDINGS) else fetch_directory(uri, directory)


def _open_all(
    config: SynthesizeConfig, teacher: Path | None, unfinished: Path, answers: Path, stack: ExitStack
) -> Opened:
    decoding, budget = _decoding(config), budget_of(config)
    opened: dict[str, tuple[Teacher, AnswerCache]] = {}
    for spec in config.teachers():
        if spec.weight:
            directory = _directory(spec, teacher, unfinished)
            teacher_of_spec = stack.enter_context(
                open_teacher(spec, decoding, config, directory=directory, budget=budget)
            )
            cache = stack.enter_context(AnswerCache(answers, teacher_of_spec.identity, decoding))
            opened[spec.name] = (teacher_of_spec, cache)
    return opened


def _directory(spec: TeacherSpec, teacher: Path | None, unfinished: Path) -> Path | None:
    if spec.kind == "endpoint":
        return None
    return teacher if spec.model_uri == INPUT else fetch_directory(spec.model_uri, unfinished / spec.name)


def _decoding(config: SynthesizeConfig) -> Decoding:
    greedy = config.decoding == "greedy"
    return Decoding(config.max_new_tokens, greedy=greedy, temperature=config.temperature, top_p=config.top_p)


def _followed(made: Iterator[ChatRecord], num_rows: int, desk: Desk) -> Iterator[ChatRecord]:
    """`made`, while progress is shown."""
    with Progress(STEP, num_rows) as progress:
        for row in made:
            yield row
            progress.advance(note=f"{desk.num_requests} requests")


def _report(config: SynthesizeConfig, num_rows: int, desk: Desk) -> None:
    """Say what became of the requests.

    Raises:
        DataError: no row came of them.
    """
    reasons = ", ".join(f"{reason} {count}" for reason, count in desk.drops.most_common()) or "none"
    if not num_rows:
        raise DataError(
            f"the teacher wrote nothing usable in {desk.num_requests} requests (dropped: {reasons}); use a larger "
            "teacher, or loosen the limits that most were dropped by"
        )
    log.info("%d rows of %d after %d requests; dropped: %s", num_rows, config.num_rows, desk.num_requests, reasons)
