"""What an answer must be before it counts, whatever its task."""

from __future__ import annotations

import re

from slmops.errors import ConfigError
from slmops.languages import LanguageFilter
from slmops.records import ChatRecord
from slmops.tasks.config import CheckSettings
from slmops.tasks.extraction import check_schema, validator_of
from slmops.tasks.interface import Rejected
from slmops.tasks.json_text import find_json
from slmops.tasks.overlap import words

MAX_LOOP_WORDS = 16
RUN_WORDS = 4
MIN_RUNS = 16
"""Fewer runs of words say nothing about repetition: a short answer may repeat its question."""
MAX_OPENING_CHARS = 400

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+|(?<=[。！？])")
_APOLOGY = re.compile(r"\b(?:sorry|apologi[sz]e|apologies|unfortunately|regret)\b|^(?:oh|hi|hello|thank)")
_CANNOT = (
    r"(?:can(?:not|'t| not)|could(?: not|n't)|won't|will not|"
    r"(?:am|'m) (?:not able|unable|not allowed|not permitted|not comfortable))"
)
_DO = (
    r"(?:help(?! but)|assist|answer|comply|fulfil|respond|reply|provide|give|do (?:that|this|so)|continue|discuss|"
    r"generate|create|write|produce|engage|participate|access|browse|summari[sz]e|translate)"
)
_AN_AI = (
    r"an? (?:\w+ )?(?:ai|artificial intelligence|language model)(?: (?:language )?(?:model|assistant|system|chatbot))?"
)
_REFUSALS = re.compile(
    "|".join(
        (
            rf"\bas {_AN_AI},? i\b",
            rf"\bi(?:'m| am) (?:just|only|merely) {_AN_AI}\b",
            rf"\bi ?(?:\w+ly )?{_CANNOT} (?:to |with )?(?:\w+ly )?{_DO}\b",
            r"\bi (?:must |have to |will |need to )?(?:respectfully |politely )?(?:decline|refuse)\b",
            r"\bi (?:do not|don't) (?:have (?:access|the ability|(?:enough|any) information)|feel comfortable)\b",
            r"\b(?:against|violates?|outside) my (?:\w+ )?(?:guidelines|polic(?:y|ies)|programming|scope)\b",
            r"\bsorry,? but i\b[^.!?]*\b(?:can't|cannot|unable|not able|won't)\b",
            r"\b(?:not appropriate|inappropriate) for me to\b",
        )
    )
)
"""What English-speaking models open a refusal with. An organisation's own `we cannot` may be the right answer."""


class Checks:
    """The checks that some settings ask for."""

    def __init__(self, settings: CheckSettings, min_agreement_fraction: float = 0.0) -> None:
        """Compile them; `min_agreement_fraction`, 0 to 1, is for prompts that are answered several times.

        Raises:
            ConfigError: a language is unknown, or `answer_schema` is no schema.
        """
        self._settings, self._min_agreement = settings, min_agreement_fraction
        self._pattern = re.compile(settings.answer_pattern)
        self._forbidden = re.compile(settings.forbidden_pattern)
        self._phrases = tuple(_plain(phrase) for phrase in settings.refusal_phrases)
        try:
            check_schema(settings.answer_schema)
        except ValueError as error:
            raise ConfigError(f"answer_schema: {error}") from None
        self._schema = validator_of(settings.answer_schema) if settings.answer_schema else None
        codes, confidence = settings.answer_languages, settings.min_language_confidence
        self._languages = LanguageFilter(codes, confidence) if codes else None

    def reason(self, record: ChatRecord, text: str, agreement: float | None = None) -> str | None:
        """Why `text` is dropped as the answer to `record`, in a word to count by; None if it may stay.

        `agreement` is the share, 0 to 1, of several answers that say the same as `text`; None if there is only one.
        """
        settings = self._settings
        if len(text) < settings.min_answer_chars:
            return "too_short"
        if len(text) > settings.max_answer_chars:
            return "too_long"
        if agreement is not None and agreement < self._min_agreement:
            return "agreement"
        if not self._pattern.search(text):
            return "pattern"
        if self._forbidden.search(text):
            return "forbidden_pattern"
        if not self._satisfies_schema(text):
            return "schema"
        if settings.drop_refusals and refuses(text, self._phrases):
            return "refusal"
        if self._languages and self._languages.reason(text):
            return "language"
        return self._repetition(text)

    def _satisfies_schema(self, text: str) -> bool:
        try:
            return self._schema is None or self._schema.is_valid(find_json(text))
        except Rejected:
            return False

    def _repetition(self, text: str) -> str | None:
        said = words(text)
        if loops(said, self._settings.max_loops):
            return "loop"
        return "repetition" if repeated_fraction(said) > self._settings.max_repeated_fraction else None


def refuses(text: str, phrases: tuple[str, ...] = ()) -> bool:
    """Whether the opening of `text` refuses to answer: its first sentence, and the second after a mere apology."""
    sentences = [part for part in _SENTENCE_END.split(_plain(text[:MAX_OPENING_CHARS])) if part]
    opening = " ".join(sentences[: 2 if sentences and _APOLOGY.search(sentences[0]) else 1])
    return bool(_REFUSALS.search(opening)) or any(phrase in opening for phrase in phrases)


def loops(said: list[str], max_loops: int) -> bool:
    """Whether some 1 to 16 words are said more than `max_loops` times in a row."""
    for length in range(1, min(MAX_LOOP_WORDS, len(said) // (max_loops + 1)) + 1):
        same = 0
        for position in range(length, len(said)):
            same = same + 1 if said[position] == said[position - length] else 0
            if same >= length * max_loops:
                return True
    return False


def repeated_fraction(said: list[str]) -> float:
    """Share of words, 0 to 1, in runs of four words that occurred before; 0 for short texts.

    After the duplicate n-grams of Rae et al. 2021, https://arxiv.org/abs/2112.11446, table A1.
    """
    if len(said) < MIN_RUNS + RUN_WORDS:
        return 0.0
    seen: set[tuple[str, ...]] = set()
    repeated = bytearray(len(said))
    for start in range(len(said) - RUN_WORDS + 1):
        run = tuple(said[start : start + RUN_WORDS])
        if run in seen:
            repeated[start : start + RUN_WORDS] = b"\1" * RUN_WORDS
        seen.add(run)
    return sum(repeated) / len(said)


def _plain(text: str) -> str:
    return text.casefold().replace("’", "'").strip(' \t\r\n"“*_')
