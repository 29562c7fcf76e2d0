"""Questions about passages of documents, with answers that stand in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmops.records import ChatRecord, Provenance
from slmops.synthesize.asking import Desk, Request, unanswered
from slmops.synthesize.config import SynthesizeConfig
from slmops.synthesize.documents import Document, Passage, passages
from slmops.tasks.interface import Rejected
from slmops.tasks.json_text import find_json
from slmops.tasks.question_answering import PROMPT, grounded
from slmops.teachers.interface import Answer

TASK = "question_answering"
MAX_ROUND = 512
"""Passages asked about at once."""


class Item(BaseModel):
    """What a teacher says about a passage, once."""

    model_config = ConfigDict(strict=True)

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    evidence: str = Field(min_length=1)


def from_documents(config: SynthesizeConfig, documents: Iterable[Document], desk: Desk) -> Iterator[ChatRecord]:
    """Rows in the documents' order, until `num_rows` are there, `max_requests` are asked or no passage is left."""
    cut = (
        passage
        for document in documents
        for passage in passages(document, config.passage_chars, config.passage_overlap_chars)
    )
    waiting = islice(cut, config.max_requests)
    seen: set[bytes] = set()
    num_rows = 0
    while num_rows < config.num_rows:
        size = min(MAX_ROUND, -(-(config.num_rows - num_rows) // config.questions_per_passage))
        asked = list(islice(waiting, size))
        if not asked:
            return
        desk.num_requests += len(asked)
        answers = desk.ask([_request(config, passage, desk) for passage in asked])
        for passage, answer in zip(asked, answers, strict=True):
            for row in _rows(config, passage, answer, desk, seen):
                num_rows += 1
                yield row
                if num_rows == config.num_rows:
                    return


def _request(config: SynthesizeConfig, passage: Passage, desk: Desk) -> Request:
    turns = (
        {
            "role": "user",
            "content": f"Passage:\n{passage.text}\n\nWrite {config.questions_per_passage} questions that this passage "
            "answers, each understood without seeing the passage's place in its document. Answer each with a few words "
            "copied exactly from the passage, and copy the whole sentence of the passage that says so as its evidence. "
            'Answer with JSON only: a list of objects {"question": "...", "answer": "...", "evidence": "..."}',
        },
    )
    return Request(desk.mixture.draw(TASK, turns), turns, config.seed)


def _rows(
    config: SynthesizeConfig, passage: Passage, answer: Answer | None, desk: Desk, seen: set[bytes]
) -> Iterator[ChatRecord]:
    if answer is None or not desk.usable(answer):
        return
    for item in _items(answer.text, desk):
        if reason := _unfit(config, item, passage):
            desk.drops[reason] += 1
            continue
        prompt = unanswered(TASK, [("user", PROMPT.format(passage=passage.text, question=item.question.strip()))])
        digest = hashlib.sha256(f"{item.question.casefold()}\0{item.answer.casefold()}".encode()).digest()[:16]
        if digest in seen:
            desk.drops["duplicate"] += 1
            continue
        provenance = Provenance(teacher=answer.model, method="documents", sources=(passage.source,))
        if row := desk.finished_row(prompt, item.answer, provenance):
            seen.add(digest)
            yield row


def _items(text: str, desk: Desk) -> Iterator[Item]:
    try:
        found = find_json(text)
    except Rejected as rejected:
        desk.drops[rejected.reason] += 1
        return
    for fields in found if isinstance(found, list) else [found]:
        try:
            yield Item.model_validate(fields)
        except ValidationError:
            desk.drops["not_an_item"] += 1


def _unfit(config: SynthesizeConfig, item: Item, passage: Passage) -> str | None:
    if len(item.question) < config.min_prompt_chars:
        return "prompt_too_short"
    if len(item.question) > config.max_prompt_chars:
        return "prompt_too_long"
    if not grounded(item.evidence, passage.text):
        return "evidence_not_in_passage"
    return None if grounded(item.answer, item.evidence) else "answer_not_in_evidence"
