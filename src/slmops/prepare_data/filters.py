"""Which texts do not belong into a data set, each with a reason that is short enough to count by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from slmops.errors import ConfigError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier  # type: ignore[import-untyped]

MAX_CONTROL_FRACTION = 0.01
"""A text with more control characters than this is taken for binary data."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_LINE_END = re.compile(r"\r\n?")


def clean(text: str) -> str:
    """The text with line ends as \\n and without byte order marks and control characters but \\t and \\n."""
    if "\r" in text:
        text = _LINE_END.sub("\n", text)
    return _CONTROL.sub("", text)


def binary_reason(text: str) -> str | None:
    """Why the text, before `clean`, is no text; None if it is."""
    found = len(_CONTROL.findall(text.replace("\r", "")))
    return "control characters" if found > 1 and found > MAX_CONTROL_FRACTION * len(text) else None


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
    """Only texts in one of `languages` (ISO 639-1 codes).

    Raises:
        ConfigError: no language, or one that cannot be recognised.
    """

    def __init__(self, languages: Sequence[str], min_confidence: float) -> None:
        self.languages, self.min_confidence = tuple(languages), min_confidence
        unknown = sorted(set(languages) - set(self._identifier.labels))
        if unknown or not languages:
            raise ConfigError(f"languages must be codes such as en, de, fr; cannot recognise {unknown}")

    def reason(self, text: str) -> str | None:
        """`language de`, or None."""
        language, confidence = self.detect(text)
        return f"language {language}" if language not in self.languages and confidence >= self.min_confidence else None

    def detect(self, text: str) -> tuple[str, float]:
        """Code of the likeliest language, and its probability from 0 to 1."""
        language, confidence = self._identifier.classify(text)
        return str(language), float(confidence)

    @cached_property
    def _identifier(self) -> LanguageIdentifier:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
