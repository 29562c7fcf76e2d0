"""When an answer is right."""

from __future__ import annotations

import json
from collections.abc import Callable


def same_text(answer: str, reference: str) -> bool:
    return answer.strip() == reference.strip()


def same_json(answer: str, reference: str) -> bool:
    """Whether both are JSON and mean the same; an answer that is no JSON is wrong, whatever else it says."""
    try:
        return bool(json.loads(answer) == json.loads(reference))
    except ValueError:
        return False


MATCHES: dict[str, Callable[[str, str], bool]] = {"exact": same_text, "json": same_json}
