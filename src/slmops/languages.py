"""Which language a text is in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from slmops.errors import ConfigError

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

MAX_LANGUAGE_CHARS = 2000
"""More of a text does not make its language clearer."""

NO_LANGUAGE = "zxx"
"""Code of what is no language: code, formulas, names (ISO 639-2)."""


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
