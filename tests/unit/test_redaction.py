"""Redaction: no value gets through, and nothing else is touched."""

from __future__ import annotations

import ipaddress
import random
import re
import string
import sys
import time
import unicodedata
from collections import Counter
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import phonenumbers
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from phonenumbers import PhoneNumberFormat

from slmops import redaction
from slmops.errors import ConfigError
from slmops.redaction import KINDS, REGIONS, Redactor, passes_luhn

REDACTOR = Redactor()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to Joe.Doe+shop@mail.example.co.uk, please", "write to [EMAIL], please"),
        ("<a href='mailto:jörg@müller-söhne.de'>", "<a href='mailto:[EMAIL]'>"),
        ('"joe doe"@example.com or o\'brien@example.ie.', "[EMAIL] or [EMAIL]."),
        ("user=joe@example.com&x=1", "user=[EMAIL]&x=1"),
        ("admin@[192.168.0.1] and root@10.0.0.1", "[EMAIL] and [EMAIL]"),
        ("**joe@example.com**", "**[EMAIL]**"),
        ("call +1 415 555 2671 now", "call [PHONE] now"),
        ("+49 (0)30 123456; +442079460958; +33.1.23.45.67.89", "[PHONE]; [PHONE]; [PHONE]"),
        ("(415) 555-2671, 415-555-2671, 415.555.2671, 1-415-555-2671", "[PHONE], [PHONE], [PHONE], [PHONE]"),
        ("made up: 555-123-4567 or +1 555 123 4567", "made up: [PHONE] or [PHONE]"),
        ("my phone is 4155552671", "my phone is [PHONE]"),
        ("Tel.: 030 1234567, 030/123 45 67, (030) 1234567", "Tel.: [PHONE], [PHONE], [PHONE]"),
        ("ich bin unter 01761234567 erreichbar", "ich bin unter [PHONE] erreichbar"),
        ("020 7946 0958 or 07911 123456", "[PHONE] or [PHONE]"),
        ("06 12 34 56 78 ou 01.23.45.67.89 ou 0033 1 23 45 67 89", "[PHONE] ou [PHONE] ou [PHONE]"),
        ("in 2024 415-555-2671 was mine", "in 2024 [PHONE] was mine"),
        ("pay with 4111111111111111 or 4111 1111 1111 1111", "pay with [CARD] or [CARD]"),
        ("Amex 378282246310005, 3782-822463-10005", "Amex [CARD], [CARD]"),
        ("two: 4111-1111-1111-1111 378282246310005", "two: [CARD] [CARD]"),
        ("13 digits 4222222222222, 19 digits 6304000000000000000", "13 digits [CARD], 19 digits [CARD]"),
        ("1234 5678 1234 5670 is written as a card", "[CARD] is written as a card"),
        ("4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1", "[CARD]"),
        ("card4111111111111111x", "card[CARD]x"),
        ("DE89 3704 0044 0532 0130 00 and de89370400440532013000", "[IBAN] and [IBAN]"),
        ("GB29NWBK60161331926819, FR14 2004 1010 0505 0001 3M02 606", "[IBAN], [IBAN]"),
        ("IBANNL91ABNA0417164300", "IBAN[IBAN]"),
        ("NO93-8601-1117-947", "[IBAN]"),
        ("from 192.168.1.10 to 8.8.8.8:53", "from [IP] to [IP]:53"),
        ("[2001:db8::1]:443, fe80::1%eth0, ::ffff:192.0.2.1", "[[IP]]:443, [IP], [IP]"),
        ("IP:2001:0db8:85a3:0000:0000:8a2e:0370:7334.", "IP:[IP]."),
        # What looks like a digit, a space or a dash is one, and what is not seen is not there.
        ("４１１１　１１１１　１１１１　１１１１", "[CARD]"),
        ("٤١١١ ١١١١ ١١١١ ١١١١", "[CARD]"),
        ("4111\u200b1111\u200d1111\u20601111", "[CARD]"),
        ("4111\u00a01111\u20111111\u20131111", "[CARD]"),
        ("4️⃣1️⃣1️⃣1️⃣1️⃣1️⃣1️⃣1️⃣1️⃣1️⃣1️⃣1️⃣1️⃣1️⃣1️⃣1️⃣", "[CARD]"),
        ("joe\u200b@exa\u00admple.com, ｊｏｅ＠ｅｘａｍｐｌｅ．ｃｏｍ", "[EMAIL], [EMAIL]"),
        ("＋４９ ３０ １２３４５６ und ١٩٢.١٦٨.١.١", "[PHONE] und [IP]"),
        ("DE89\u202f3704\u202f0044\u202f0532\u202f0130\u202f00", "[IBAN]"),
        ("a 4111111111111111¹ with a footnote", "a [CARD]¹ with a footnote"),
    ],
)  # fmt: skip
def test_personal_data_is_replaced(text: str, expected: str) -> None:
    assert REDACTOR.redact(text)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "order 4155552671, invoice no. 0301234567, ticket #0123456789, ISBN 0306406152",
        "ISBN 978-3-16-148410-0, order 114-2345678-9876543, EAN 4006381333931",
        "on 2024-01-15 at 12:30:45, 15.01.2024, 03.04.2024 and 1/15/2024; 1914-1918, 2020-2021",
        "2024-01-15T12:30:45.123456Z, 20240131235959, 2024-02-28 2024-02-29 2024-03-01",
        "1,234,567.89 EUR, 1.234.567.890,00, $12,345,678, 12 345 678 kr",
        "v1.2.3, version 10.0.19045.3, Chrome/114.0.5735.90, 1.2.3.4.5, see section 4.1.2.3",
        '{"id": 1234567890123, "t": 1705312345678, "v": [0.1, 0.30000000000000004, 1e-10]}',
        "3.14159265358979, 52.520008, 13.404954, 0.7911123456, -73.985428",
        "12345678901234567890 * 2 = 24691357802469135780; 2^31 = 2147483648",
        "1 2 3 4 5 6 7 8 9 10 11 12, 0101 1010 1100",
        "x[1::2], a[::-1], std::vector<int>, abc::def, 12:30:45, aa:bb:cc:dd:ee:ff",
        "@user, a @ b, 3@5.00, lodash@4.17.21, @app.route('/x')",
        "at 20 minutes past the hour, de 89 people, no 12 and more of the same kind",
        "deadbeef0123456789abcdef, 550e8400-e29b-41d4-a716-446655440000",
        "999.999.999.999, 256.1.1.1, 10.0.0",
        "a ratio of 16:9, Psalm 119:105, 100 % of 7",
    ],
)
def test_other_numbers_stay(text: str) -> None:
    assert REDACTOR.redact(text) == (text, Counter())


def test_it_counts_by_kind_and_never_keeps_values() -> None:
    text, counts = REDACTOR.redact("a@b.org c@d.org 4111111111111111 8.8.8.8")
    assert text == "[EMAIL] [EMAIL] [CARD] [IP]"
    assert counts == {"email": 2, "card": 1, "ip": 1}


def test_only_the_kinds_that_are_asked_for() -> None:
    text = "a@b.org 4111111111111111 +49 30 123456 8.8.8.8 DE89370400440532013000"
    assert Redactor(["card"]).redact(text)[0] == text.replace("4111111111111111", "[CARD]")
    assert Redactor([]).redact(text)[0] == text
    with pytest.raises(ConfigError, match="unknown kinds of personal data: cards; known are email, phone"):
        Redactor(["cards"])


def test_national_numbers_are_those_of_the_regions() -> None:
    assert Redactor(regions=["US"]).redact("030 1234567")[0] == "030 1234567"
    assert Redactor(regions=["ES"]).redact("llame al teléfono 912 345 678")[0] == "llame al teléfono [PHONE]"
    assert Redactor(regions=["ES"]).redact("912 345 678 EUR")[0] == "912 345 678 EUR"
    assert Redactor(regions=[]).redact("+34 912 345 678")[0] == "[PHONE]"
    with pytest.raises(ConfigError, match="no phone numbers are known of region 'XX'"):
        Redactor(regions=["XX"])


# ---- secrets of every kind, in any place ----


def random_digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def in_groups(rng: random.Random, text: str, sizes: list[int]) -> str:
    separator = rng.choice(["", " ", "-", ".", "\u00a0", "\u2011", " - ", "\u2009", "  "])
    groups = []
    for size in sizes:
        groups.append(text[:size])
        text = text[size:]
    return separator.join([*groups, text] if text else groups)


def make_email(rng: random.Random) -> str:
    local = "".join(rng.choices(string.ascii_letters + string.digits + "._%+-", k=rng.randint(6, 20)))
    labels = [
        "".join(rng.choices(string.ascii_lowercase + string.digits, k=rng.randint(2, 9)))
        for _ in range(rng.randint(1, 3))
    ]
    return f"x{local}x@{'.'.join(labels)}.{rng.choice(['com', 'de', 'museum', 'co.uk', 'xn--p1ai'])}"


def make_card(rng: random.Random) -> str:
    prefix, length, sizes = rng.choice([
        ("4", 16, [4, 4, 4]), ("4", 13, []), ("4", 19, [4, 4, 4, 4]), (f"5{rng.randint(1, 5)}", 16, [4, 4, 4]),
        (str(rng.randint(2221, 2720)), 16, [4, 4, 4]), ("34", 15, [4, 6]), ("37", 15, [4, 6]), ("36", 14, [4, 6]),
        ("6011", 16, [4, 4, 4]), ("62", 17, [4, 4, 4, 4]), ("62", 18, [4, 4, 4, 4]), ("3566", 16, [8]),
    ])  # fmt: skip
    body = prefix + random_digits(rng, length - len(prefix) - 1)
    card = next(body + digit for digit in string.digits if passes_luhn(body + digit))
    return in_groups(rng, card, sizes if len(sizes) > 1 else [])


def make_iban(rng: random.Random) -> str:
    country, form = rng.choice(sorted(redaction._IBAN_FORMS.items()))
    alphabets = {"n": string.digits, "a": string.ascii_uppercase, "c": string.digits + string.ascii_uppercase}
    rest = "".join(
        "".join(rng.choices(alphabets[kind], k=int(count))) for count, kind in re.findall(r"(\d+)([nac])", form)
    )
    check = 98 - int("".join(str(int(char, 36)) for char in f"{rest}{country}00")) % 97
    iban = f"{country}{check:02d}{rest}"
    iban = in_groups(rng, iban, [4] * ((len(iban) - 1) // 4)) if rng.random() < 0.5 else iban
    return rng.choice([str.upper, str.lower, str.title])(iban)


def make_ip(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return str(ipaddress.IPv4Address(rng.getrandbits(32)))
    address = ipaddress.IPv6Address(
        (1 << 125) + rng.getrandbits(125) & ~(((1 << 48) - 1) << 16 if rng.random() < 0.5 else 0)
    )
    return rng.choice([address.compressed, address.exploded, address.compressed.upper()])


def make_phone(rng: random.Random) -> str:
    while True:
        national = rng.random() < 0.5
        region = rng.choice(REGIONS if national else sorted(phonenumbers.SUPPORTED_REGIONS))
        kind = rng.choice([phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE])
        example = phonenumbers.example_number_for_type(region, kind)
        if example is None:
            continue
        number = phonenumbers.PhoneNumber()
        number.merge_from(example)
        number.national_number = (example.national_number or 0) // 1000 * 1000 + rng.randrange(1000)
        if phonenumbers.is_valid_number(number):
            forms = (
                [PhoneNumberFormat.NATIONAL] if national else [PhoneNumberFormat.E164, PhoneNumberFormat.INTERNATIONAL]
            )
            return phonenumbers.format_number(number, rng.choice(forms))


MAKERS = {"email": make_email, "phone": make_phone, "card": make_card, "iban": make_iban, "ip": make_ip}
assert set(MAKERS) == set(KINDS)


def disguise(rng: random.Random, secret: str) -> str:
    """The secret as it looks, in other characters."""
    trick = rng.choice(["none", "none", "full width", "zero width", "no break"])
    if trick == "full width":
        return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in secret)
    if trick == "zero width":
        at = rng.randint(1, len(secret) - 1)
        return secret[:at] + rng.choice("\u200b\u200c\u200d\u2060\ufeff\u00ad") + secret[at:]
    if trick == "no break":
        return secret.replace(" ", "\u00a0").replace("-", "\u2011")
    return secret


def skeleton(text: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text))).lower()


BESIDE = st.sampled_from([" ", "\n", ", ", ": ", "; ", " (", ") ", '"', "'", "<", ">", "=", "|", "\t", "？", "。 "])


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    before=st.text(max_size=20) | st.sampled_from(["", "12", "in 2024", "4111", "[PHONE]", "a@b", "1.2.3"]),
    after=st.text(max_size=20) | st.sampled_from(["", "12", "2024", "4111 1111", "@", ".5", "::1"]),
    opening=BESIDE,
    closing=BESIDE,
)
def test_no_secret_gets_through_and_a_second_time_changes_nothing(
    kind: str, seed: int, before: str, after: str, opening: str, closing: str
) -> None:
    assume(kind != "ip" or "§" not in before)  # then it is the number of a section
    rng = random.Random(seed)
    plain = MAKERS[kind](rng)
    redacted, counts = REDACTOR.redact(before + opening + disguise(rng, plain) + closing + after)
    secret, shown = skeleton(plain), skeleton(redacted)
    assert sum(counts.values()) >= 1, plain
    surroundings = skeleton(before + opening) + "\n" + skeleton(closing + after)
    for at in range(len(secret) - 6):
        part = secret[at : at + 7]
        assert part not in shown or part in surroundings, (plain, redacted)
    assert REDACTOR.redact(redacted) == (redacted, Counter())


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("0123456789+()-./ :@aF[]_\u200b４"), max_size=60))
def test_any_mixture_of_digits_and_signs_is_settled_at_once(text: str) -> None:
    redacted, _ = REDACTOR.redact(text)
    assert REDACTOR.redact(redacted) == (redacted, Counter())


@pytest.mark.parametrize(
    "text", ["a" * 200_000 + "@", "1 " * 100_000, "4111-" * 40_000, "ab:" * 70_000, "f" * 200_000, "a@" * 100_000,
             "1." * 100_000, "+(" * 100_000 + "1", "DE89" * 50_000]
)  # fmt: skip
def test_a_hostile_cell_takes_no_more_than_moments(text: str) -> None:
    started = time.process_time()
    REDACTOR.redact(text)
    assert time.process_time() - started < 5


# ---- names ----

PERSONS = ("Ada Lovelace", "John Smith")


class AnalyzerDouble:
    """Stands for Presidio's AnalyzerEngine, whose language models cannot be had offline.

    By the documented interface: `analyze(text, language, entities, score_threshold)` gives results with `start`, `end`,
    `score` and `entity_type`, in any order, which may overlap.
    """

    def __init__(self, *, nlp_engine: Any, supported_languages: list[str]) -> None:
        assert nlp_engine == {
            "nlp_engine_name": "spacy",
            "models": [{"lang_code": "en", "model_name": "en_core_web_sm"}],
        }
        assert supported_languages == ["en"]

    def analyze(self, *, text: str, language: str, entities: list[str], score_threshold: float) -> list[Any]:
        assert (language, entities) == ("en", ["PERSON"])
        assert score_threshold == 0.5
        names = [*PERSONS, *(part for name in PERSONS for part in name.split()), "EMAIL"]
        found = [match.span() for name in names for match in re.finditer(name, text)]
        return [SimpleNamespace(start=start, end=end, score=0.85, entity_type="PERSON") for start, end in found[::-1]]


@pytest.fixture
def presidio(monkeypatch: pytest.MonkeyPatch) -> None:
    analyzer, nlp_engine = ModuleType("presidio_analyzer"), ModuleType("presidio_analyzer.nlp_engine")

    class NlpEngineProvider:
        def __init__(self, *, nlp_configuration: dict[str, Any]) -> None:
            self.create_engine = lambda: nlp_configuration

    vars(analyzer).update(AnalyzerEngine=AnalyzerDouble)
    vars(nlp_engine).update(NlpEngineProvider=NlpEngineProvider)
    for module in (analyzer, nlp_engine, ModuleType("en_core_web_sm")):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("presidio")
def test_names_are_replaced_where_presidio_is_installed() -> None:
    redact = Redactor(names=True).redact
    text, counts = redact("Ada Lovelace <ada@example.com> wrote to [John Smith] and Ada.")
    assert text == "[NAME] <[EMAIL]> wrote to [[NAME]] and [NAME]."
    assert counts == {"email": 1, "name": 3}
    assert redact(text) == (text, Counter())
    assert redact(" ") == (" ", Counter())


@pytest.mark.usefixtures("presidio")
def test_presidio_is_not_left_to_download_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "en_core_web_sm")
    with pytest.raises(ConfigError, match="Presidio has no language model; install one of en_core_web_lg"):
        Redactor(names=True)


def test_names_without_presidio_are_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ConfigError, match="install presidio-analyzer and en_core_web_lg, or leave names out"):
        Redactor(names=True)
