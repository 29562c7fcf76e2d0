"""When an answer is right."""

from __future__ import annotations

import json
from collections.abc import Callable

from slmops.records import ChatRecord
from slmops.tasks.registry import Tasks

Match = Callable[[str, ChatRecord], bool]
"""Whether an answer is right for a record."""


def same_text(answer: str, reference: str) -> bool:
    return answer.strip() == reference.strip()


def same_json(answer: str, reference: str) -> bool:
    """Whether both are JSON and mean the same; an answer that is no JSON is wrong, whatever else it says."""
    try:
        return bool(json.loads(answer) == json.loads(reference))
    except ValueError:
        return False


def match_of(name: str, tasks: Tasks) -> Match:
    """The comparison called `name`: `exact`, `json` or `task`."""
    if name == "task":
        return lambda answer, record: tasks.of(record).correct(answer, record.completion)
    same = {"exact": same_text, "json": same_json}[name]
    return lambda answer, record: same(answer, record.completion)
