"""Settings of the checks that an answer passes before it counts."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from slmops.config import Config


class CheckSettings(Config):
    """What an answer must be, whatever its task; a step that checks answers has these among its settings."""

    min_answer_chars: int = Field(default=1, ge=1)
    """Drop shorter answers, in characters."""
    max_answer_chars: int = Field(default=100_000, ge=1)
    """Drop longer answers, in characters."""
    answer_pattern: str = r"(?s)."
    """Drop answers in which this regular expression finds nothing."""
    forbidden_pattern: str = r"(?!)"
    """Drop answers in which this regular expression finds something; `(?!)` never does."""
    answer_schema: dict[str, Any] = Field(default={})
    """JSON Schema (2020-12) that every answer must satisfy; `{}` also takes what is no JSON."""
    drop_refusals: bool = True
    """Drop answers whose opening refuses to answer."""
    refusal_phrases: list[str] = Field(default=[])
    """More openings of a refusal beside the English ones, in any case: `Das kann ich leider nicht`."""
    max_loops: int = Field(default=8, ge=2, le=10_000)
    """Drop answers that say the same 1 to 16 words more often than this without a break."""
    max_repeated_fraction: float = Field(default=0.5, ge=0, le=1)
    """Drop answers of which more than this share of words lies in runs of four that were said before; 1 drops none."""
    answer_languages: list[str] = Field(default=[])
    """Drop answers in other languages, by ISO 639-1 code; empty takes all."""
    min_language_confidence: float = Field(default=0.9, ge=0.5, le=1)
    """How sure it must be that an answer is in another language; one that is too short to tell stays."""

    @field_validator("answer_pattern", "forbidden_pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return pattern

    @field_validator("refusal_phrases")
    @classmethod
    def _say_something(cls, phrases: list[str]) -> list[str]:
        if any(len(phrase.strip()) < 4 for phrase in phrases):
            raise ValueError("a phrase of fewer than 4 characters is found in any answer")
        return phrases
