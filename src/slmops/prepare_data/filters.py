"""Which texts do not belong into a data set, each with a reason that is short enough to count by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from slmops.errors import ConfigError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier  # type: ignore[import-untyped]

MAX_CONTROL_FRACTION = 0.1
"""A text with more control characters than this is taken for binary data: of random bytes a quarter are such."""
MAX_STRAY_CONTROLS = 3
"""So many are harmless however short the text is."""

MAX_LANGUAGE_CHARS = 2000
"""More of a text does not make its language clearer."""

NO_LANGUAGE = "zxx"
"""Code of what is no language: code, formulas, names (ISO 639-2)."""

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


class LanguageFilter:
    """Only texts in one of `languages`, ISO 639-1 codes.

    Args:
        min_confidence: How sure it must be that a text is in another language, 0.5 to 1; one that is too short or too
            mixed to tell stays.

    Raises:
        ConfigError: a language that cannot be recognised.
    """

    def __init__(self, languages: Sequence[str], min_confidence: float) -> None:
        self.languages, self.min_confidence = frozenset(languages), min_confidence
        unknown = sorted(self.languages - set(self._identifier.labels))
        if unknown:
            raise ConfigError(
                f"languages must be ISO 639-1 codes such as en, de, fr, got {', '.join(map(repr, unknown))}"
            )

    def reason(self, text: str) -> str | None:
        """`language de`, or None."""
        ranking = self._identifier.rank(text[:MAX_LANGUAGE_CHARS])
        language, likeliest = ranking[0]
        if language in self.languages or language == NO_LANGUAGE:
            return None
        # The likeliest language against the wanted ones alone: among all languages even a clear text is spread over
        # relatives (Dutch, Afrikaans), so its own probability says little about whether it is English.
        wanted = sum(probability for code, probability in ranking if code in self.languages)
        return f"language {language}" if likeliest >= self.min_confidence * (likeliest + wanted) else None

    @cached_property
    def _identifier(self) -> LanguageIdentifier:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
