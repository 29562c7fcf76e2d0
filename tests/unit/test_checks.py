"""Checks: what an answer must be before it counts, each drop with a reason of its own."""

from __future__ import annotations

from typing import Any

import pytest

from slmops.checks import Checks, loops, repeated_fraction
from slmops.errors import ConfigError
from slmops.tasks.config import CheckSettings
from slmops.tasks.overlap import words
from tests.datasets import chat_record

RECORD = chat_record("Where is my card?", "It is on its way.")


def reason(text: str, **settings: Any) -> str | None:
    return Checks(CheckSettings.create(settings)).reason(RECORD, text)


def test_plain_answers_stay() -> None:
    assert reason("It is on its way, and should be with you within five working days.") is None
    assert reason("card_arrival") is None
    assert reason("42") is None


@pytest.mark.parametrize(
    ("text", "settings", "why"),
    [
        ("Yes", {"min_answer_chars": 4}, "too_short"),
        ("Yes", {"max_answer_chars": 2}, "too_long"),
        ("Yes", {"answer_pattern": "^(yes|no)$"}, "pattern"),
        ("Call 555-1234", {"forbidden_pattern": r"\d{3}-\d{4}"}, "forbidden_pattern"),
        ("Yes", {"answer_schema": {"type": "object"}}, "schema"),
        ('{"a": 1}', {"answer_schema": {"required": ["b"]}}, "schema"),
        ("Das kann ich leider nicht beantworten.", {"refusal_phrases": ["das kann ich leider nicht"]}, "refusal"),
        ("Wo ist meine Karte? Ich warte seit Wochen darauf.", {"answer_languages": ["en", "fr"]}, "language"),
    ],
)
def test_each_drop_has_its_reason(text: str, settings: dict[str, Any], why: str) -> None:
    assert reason(text, **settings) == why


def test_a_short_answer_is_in_no_language() -> None:
    assert reason("card_arrival", answer_languages=["en"]) is None
    assert reason("Where is my card? I have waited for weeks.", answer_languages=["de", "en"]) is None


def test_agreement_counts_only_where_there_was_a_vote() -> None:
    checks = Checks(CheckSettings(), min_agreement_fraction=0.5)
    assert checks.reason(RECORD, "Yes", 0.4) == "agreement"
    assert checks.reason(RECORD, "Yes", 0.5) is None
    assert checks.reason(RECORD, "Yes") is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry. I cannot assist you with this request.",
        "Sorry, but I won't be able to do this.",
        "As an AI language model, I do not have personal opinions.",
        "I am just an AI assistant and have no opinion.",
        "I'm not able to provide legal advice. Please ask a lawyer.",
        "Unfortunately, I am unable to answer this question.",
        "I must respectfully decline to do so.",
        "I don't have enough information to answer.",
        "This goes against my safety guidelines, so no.",
    ],
)
def test_refusals_are_found_in_many_words(text: str) -> None:
    assert reason(text) == "refusal"
    assert reason(text, drop_refusals=False) is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that your card was stolen. Block it in the app.",
        "As an AI engineer, you will need to know statistics.",
        "We cannot exchange that currency in the app.",
        "It is not possible to change the PIN abroad.",
        "I can't help but admire the view.",
        "The bridge is closed. I cannot say for how long, since I am unable to access the site.",
    ],
)
def test_what_only_sounds_like_a_refusal_stays(text: str) -> None:
    assert reason(text) is None


def test_an_answer_that_goes_round_in_circles_is_dropped() -> None:
    assert reason("The card is here. " + "and so on " * 10) == "loop"
    assert reason("好的好的" * 8) == "loop"
    assert reason("no, no, no, no!") is None
    sentences = "The card comes by post within a week. The card comes by post within a week, we think. "
    assert reason(sentences * 2) == "repetition"
    assert reason(sentences * 2, max_repeated_fraction=1.0) is None


def test_repetition_is_a_share_of_words() -> None:
    unique = " ".join(f"w{number}" for number in range(40))
    assert repeated_fraction(words(unique)) == 0
    assert repeated_fraction(words(f"{unique} {unique}")) == 0.5
    assert repeated_fraction(words("yes it is so, yes it is so")) == 0, "too short to tell"
    assert loops(words("a b c " * 9), 8)
    assert not loops(words("a b c " * 8), 8)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="answer_pattern: no regular expression"):
        CheckSettings.create({"answer_pattern": "("})
    with pytest.raises(ConfigError, match="found in any answer"):
        CheckSettings.create({"refusal_phrases": [" "]})
    with pytest.raises(ConfigError, match="answer_schema: no JSON Schema"):
        reason("Yes", answer_schema={"type": "thing"})
    with pytest.raises(ConfigError, match="languages must be ISO 639-1 codes such as en, de, fr, got 'xx'"):
        reason("Yes", answer_languages=["xx"])
