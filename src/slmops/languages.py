"""Which language a text is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slmops.errors import ConfigError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

MIN_LETTERS = 20
"""A text with fewer letters says too little of its language."""


class Languages:
    """Tells texts in wanted languages from others, with py3langid (Lui and Baldwin 2012, 97 languages)."""

    def __init__(self, codes: Sequence[str], min_confidence: float) -> None:
        """Take ISO 639-1 codes, at least one, and the probability from 0 to 1 that a language must have.

        Raises:
            ConfigError: a language is unknown.
        """
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier: LanguageIdentifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = sorted({str(label) for label in self._identifier.labels})
        if unknown := sorted(set(codes) - set(known)):
            raise ConfigError(f"unknown languages {', '.join(unknown)}; choose among {', '.join(known)}")
        self._codes, self._min_confidence = frozenset(codes), min_confidence

    def reason(self, text: str) -> str | None:
        """`language` or `language_unclear`; None for a text in a wanted language, and for one too short to tell."""
        if sum(map(str.isalpha, text[:1000])) < MIN_LETTERS:
            return None
        code, confidence = self._identifier.classify(text)
        if confidence < self._min_confidence:
            return "language_unclear"
        return None if code in self._codes else "language"
