"""Which texts stay out of a data set, and what is cleaned away."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.errors import ConfigError
from slmops.languages import LanguageFilter
from slmops.prepare_data.filters import LengthFilter, binary_reason, clean

BANKING77 = Path(__file__).parents[3] / "shared" / "data" / "banking77" / "test.csv"

FOREIGN = {
    "de": ["Wo ist meine Karte?", "Meine Karte wurde gestohlen", "Warum wurde meine Zahlung abgelehnt?",
           "Ich möchte mein Geld zurück", "Wie lange dauert eine Überweisung?"],
    "fr": ["Où est ma carte ?", "Ma carte a été volée", "Pourquoi mon paiement a-t-il été refusé ?",
           "J'ai oublié mon mot de passe", "Combien de temps prend un virement ?"],
    "es": ["¿Dónde está mi tarjeta?", "Me han robado la tarjeta", "¿Por qué se rechazó mi pago?",
           "He olvidado mi contraseña", "La transferencia sigue pendiente"],
    "ja": ["カードはどこですか", "支払いが拒否されました"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffa first line\r\nand a second\rand a third", "a first line\nand a second\nand a third"),
        ("a\x00b\x07c\x7fd\te\n", "abcd\te\n"),
        ("\x1b[1;31mred\x1b[0m text", "red text"),
        ("page\x0cpage\x85line\u2028line\u2029end", "page\npage\nline\nline\nend"),
        ("Grüße, 你好, मुझे, 👩\u200d👩\u200d👧, na\u00efve", "Grüße, 你好, मुझे, 👩\u200d👩\u200d👧, na\u00efve"),
    ],
)
def test_control_characters_are_cleaned_away(text: str, expected: str) -> None:
    assert clean(text) == expected
    assert binary_reason(text) is None


@given(st.text(max_size=60))
def test_a_clean_text_stays_as_it_is(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert not set(cleaned) & {*map(chr, range(9)), *map(chr, range(11, 32)), "\x7f", "\ufeff"}


def test_binary_data_is_not_cleaned_but_set_aside() -> None:
    random_bytes = random.Random(0).randbytes(400).decode("latin-1")
    assert binary_reason(random_bytes) == "control characters"
    assert binary_reason("\x00P\x00K\x00x\x00" * 20) == "control characters"
    assert binary_reason("a bell\x07 here and a NUL\x00 there") is None


def test_length_is_within_bounds_that_are_included() -> None:
    reason = LengthFilter(2, 4).reason
    assert [reason("x" * length) for length in (1, 2, 4, 5)] == ["too short", None, None, "too long"]


@pytest.fixture(scope="module")
def english() -> Callable[[str], str | None]:
    """The filter for English, at the confidence that the step asks for."""
    return LanguageFilter(["en"], 0.9).reason


def test_another_language_is_named_and_what_cannot_be_told_stays(english: Callable[[str], str | None]) -> None:
    for language, texts in FOREIGN.items():
        found = [english(text) for text in texts]
        assert None not in found
        assert found.count(f"language {language}") >= len(texts) - 1, found
    for text in ("Where is my card?", "card arrival", "ok", "123", "", "?!", "x = 1", "SQL", "https://example.com"):
        assert english(text) is None, text
    german = LanguageFilter(["de", "fr"], 0.9).reason
    assert german("Wo ist meine Karte?") is german("Où est ma carte ?") is None
    assert german("I am still waiting for my new card") == "language en"


@pytest.mark.skipif(not BANKING77.is_file(), reason="the public data set banking77 does not lie beside the checkout")
def test_short_questions_to_a_bank_are_not_lost(english: Callable[[str], str | None]) -> None:
    with open(BANKING77, newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][::2]
    lost = [text for text in texts if english(text)]
    assert len(lost) <= 0.001 * len(texts), lost


def test_a_language_must_be_a_code_that_can_be_recognised() -> None:
    with pytest.raises(ConfigError, match="ISO 639-1 codes such as en, de, fr, got 'english', 'xx'"):
        LanguageFilter(["english", "en", "xx"], 0.9)
