"""Which texts do not belong into a data set, each with a reason that is short enough to count by."""

from __future__ import annotations

import re

MAX_CONTROL_FRACTION = 0.1
"""A text with more control characters than this is taken for binary data: of random bytes a quarter are such."""
MAX_STRAY_CONTROLS = 3
"""So many are harmless however short the text is."""

_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""What colours a terminal's text (ECMA-48)."""
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_MARKS = re.compile(r"[\ufeff\ufffe\uffff]")
"""Byte order marks, whole or halved, and what is no character."""
_TO_CLEAN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def clean(text: str) -> str:
    """The text with every line end as \\n, and without control characters but \\t and \\n.

    Escape sequences of terminals and byte order marks go as well. What is left looks the same to a reader, and a model
    does not have to learn it.
    """
    if not _TO_CLEAN.search(text):
        return text
    text = _LINE_END.sub("\n", _ESCAPE_SEQUENCE.sub("", text))
    return _MARKS.sub("", _CONTROL.sub("", text))


def binary_reason(text: str) -> str | None:
    """Why the text, before `clean`, is no text; None if it is."""
    if not _TO_CLEAN.search(text):
        return None
    found = len(_CONTROL.findall(_ESCAPE_SEQUENCE.sub("", text)))
    few = found <= max(MAX_STRAY_CONTROLS, MAX_CONTROL_FRACTION * len(text))
    return None if few else "control characters"


class LengthFilter:
    """Bounds on the length of a text in characters, both included."""

    def __init__(self, min_chars: int, max_chars: int) -> None:
        self.min_chars, self.max_chars = min_chars, max_chars

    def reason(self, text: str) -> str | None:
        """`too short`, `too long`, or None."""
        if len(text) < self.min_chars:
            return "too short"
        return "too long" if len(text) > self.max_chars else None
