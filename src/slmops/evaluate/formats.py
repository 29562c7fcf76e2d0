"""Whether an answer has the form that the task's answers have, right or wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from slmops.records import ChatRecord
from slmops.tasks.interface import Rejected
from slmops.tasks.registry import Tasks

Form = Callable[[str, ChatRecord], bool]
"""Whether an answer to a record is well-formed."""

MAX_LABELS_SHARE = 0.5
"""References of which at most this share are different make a closed set of labels."""


def form_of(match: str, tasks: Tasks, records: Sequence[ChatRecord]) -> Form:
    """The form that goes with a comparison called `match`.

    `json`: a JSON value of the reference's kind, an object with its keys; `task`: what the record's task accepts;
    `exact`: one of the references where these are a closed set of labels, else any text that is not blank.
    """
    if match == "json":
        return lambda answer, record: _alike(answer, record.completion)
    if match == "task":
        return lambda answer, record: _accepted(answer, record, tasks)
    labels = {record.completion.strip() for record in records}
    if len(labels) > MAX_LABELS_SHARE * len(records):
        return lambda answer, _: bool(answer.strip())
    return lambda answer, _: answer.strip() in labels


def _alike(answer: str, reference: str) -> bool:
    try:
        found, wanted = json.loads(answer), json.loads(reference)
    except (ValueError, RecursionError):
        return False
    if isinstance(wanted, dict):
        return isinstance(found, dict) and found.keys() == wanted.keys()
    return type(found) is type(wanted)


def _accepted(answer: str, record: ChatRecord, tasks: Tasks) -> bool:
    try:
        tasks.of(record).parse(answer, record)
    except Rejected:
        return False
    return True
