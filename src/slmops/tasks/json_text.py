"""JSON in what a model says, and when two values are the same."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from slmops.tasks.interface import Rejected

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_OPENING = re.compile(r"[{\[]")


def find_json(text: str) -> Any:
    """The one JSON value in `text`: all of it, or in a fenced block, or an object or array among other words.

    Raises:
        Rejected: `not_json`, if there is none or several.
    """
    blocks = _FENCED.findall(text)
    for whole in (text, *(blocks if len(blocks) == 1 else ())):
        try:
            return strict_json(whole)
        except ValueError:
            continue
    opening = _OPENING.search(text)
    if not opening or len(blocks) > 1:
        raise Rejected("not_json")
    try:
        value, end = _DECODER.raw_decode(text, opening.start())
    except (ValueError, RecursionError):
        raise Rejected("not_json") from None
    if _OPENING.search(text, end):
        raise Rejected("not_json")
    return value


def strict_json(text: str) -> Any:
    """`json.loads` without NaN and Infinity.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def canonical(value: Any) -> str:
    """The same text for the same JSON value: keys in order, 1.0 as 1, but true never as 1."""
    return json.dumps(_plain(value), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def fields(value: Any) -> Counter[tuple[str, str]]:
    """Each leaf as (path, canonical value), counted; the items of a list share a path, so their order is free."""
    return Counter(_leaves(value, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for item in value:
            yield from _leaves(item, f"{path}[]")
    else:
        yield path, canonical(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
