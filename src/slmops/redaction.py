"""Personal data in text, found by form and checksum and replaced by what it was.

Light on purpose: standard library and phonenumbers, so that it can run on an edge node. What counts as personal data:

- e-mail addresses;
- phone numbers: international ones, and those of `regions` as people write them there. A bare row of digits counts only
  behind a word such as "call", or if it begins with the 0 of its region and is a valid number: order numbers stay;
- payment cards: 13 to 19 digits that pass Luhn's check (ISO/IEC 7812-1), in blocks as on a card;
- IBANs of the registered form of their country with valid check digits (ISO 13616, ISO 7064 mod 97-10);
- IP addresses, but no version numbers, no slices such as [1::2], no unspecified or loopback IPv6 address;
- names of persons, if asked for, as Presidio finds them.

Digits of other scripts, full-width letters, zero-width characters, and all kinds of spaces and dashes are read as what
they look like. A value that runs into further letters or digits is found where its form allows it.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Literal, get_args

from slmops.errors import ConfigError
from slmops.phone_numbers import PhoneFinder, Span

Kind = Literal["email", "phone", "card", "iban", "ip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
REGIONS = ("US", "GB", "DE", "FR")

_GROUP = re.compile(r"[0-9]+")
_SEPARATORS = " ._/()-"
"""What may stand between the groups of digits of one number, three of them at most."""

# What UTF-8 bytes of a text have to be looked at: ASCII digits, `@`, `:` and the lead bytes of scripts that have digits
# or full-width forms of their own. In all other bytes nothing can hide.
_SUSPICIOUS = frozenset(b"0123456789@:\xd9\xdb\xdf\xe0\xe1\xea\xef\xf0")
_HARMLESS = bytes(byte for byte in range(256) if byte not in _SUSPICIOUS)
_NO_MARKS = bytes(byte for byte in range(256) if byte not in b"0123456789@:")

_GONE = "\ue000"
"""Stands for a character that is not seen, until it is taken out; of the private use area."""


class Redactor:
    """Replaces personal data by `[EMAIL]`, `[PHONE]`, `[CARD]`, `[IBAN]`, `[IP]` and `[NAME]`.

    Args:
        kinds: What to look for, some of `KINDS`.
        names: Also look for names of persons, with Presidio.
        regions: Whose national phone numbers to look for, ISO 3166 codes.

    Raises:
        ConfigError: an unknown kind or region, or names where Presidio or its language model is not installed.
    """

    def __init__(self, kinds: Iterable[str] = KINDS, *, names: bool = False, regions: Iterable[str] = REGIONS) -> None:
        self.kinds = frozenset(kinds)
        unknown = sorted(self.kinds - set(KINDS))
        if unknown:
            raise ConfigError(f"unknown kinds of personal data: {', '.join(unknown)}; known are {', '.join(KINDS)}")
        self._phones: PhoneFinder | None = None
        if "phone" in self.kinds:
            self._phones = PhoneFinder(regions)
        self._names = None
        if names:
            from slmops.person_names import NameFinder

            self._names = NameFinder()

    def redact(self, text: str) -> tuple[str, Counter[str]]:
        """The text with placeholders, and how many values of each kind were replaced; never the values.

        To redact a second time changes nothing, as far as names are not concerned.
        """
        counts: Counter[str] = Counter()
        # What is left beside a placeholder may be a value in its own right: look again until nothing is found.
        while marks := text.encode("utf-8", "surrogatepass").translate(None, _HARMLESS):
            found = self._find(text, marks)
            if not found:
                break
            text = _replace(text, found)
            counts.update(kind for _, _, kind in found)
        if self._names is not None:
            found = [(start, end, "name") for start, end in self._names.spans(text)]
            text = _replace(text, found)
            counts.update(kind for _, _, kind in found)
        return text, counts

    def _find(self, text: str, marks: bytes) -> list[tuple[int, int, str]]:
        """(start, end, kind) of what is found, in order, without overlaps; `marks` are its suspicious bytes."""
        folded, positions = _fold(text)
        if not marks.isascii():
            marks = folded.encode("utf-8", "surrogatepass").translate(None, _NO_MARKS)
        num_colons, num_ats = marks.count(b":"), marks.count(b"@")
        num_digits = len(marks) - num_colons - num_ats
        found: list[tuple[int, int, str]] = []

        def take(kind: Kind, spans: Iterable[Span]) -> None:
            # What is taken is blanked, so that no other kind takes a part of it.
            nonlocal folded
            taken = list(spans)
            if not taken:
                return
            found.extend((start, end, kind) for start, end in taken)
            folded = _blank(folded, taken)

        if num_ats and "email" in self.kinds:
            take("email", _emails(folded))
        if "ip" in self.kinds and (num_colons >= 6 or "::" in folded):
            take("ip", _ipv6_addresses(folded))
        if num_digits >= 2:
            runs = _runs(folded)
            if "ip" in self.kinds and any(len(run) >= 4 for run in runs):
                take("ip", _ipv4_addresses(folded, runs))
            if "iban" in self.kinds:
                take("iban", _ibans(folded, runs))
            runs = _long_runs(folded) if found else [run for run in runs if _num_digits(run) >= 7]
            if runs:
                folded = _without_dates(folded, runs)
                if "card" in self.kinds:
                    take("card", _cards(folded, _long_runs(folded)))
                if self._phones is not None:
                    take("phone", self._phones.spans(folded, _long_runs(folded)))
        found.sort()
        if positions is None:
            return found
        positions.append(len(text))
        return [(positions[start], positions[end], kind) for start, end, kind in found]


def _replace(text: str, found: list[tuple[int, int, str]]) -> str:
    parts, at = [], 0
    for start, end, kind in found:
        parts += [text[at:start], f"[{kind.upper()}]"]
        at = end
    return "".join([*parts, text[at:]])


def _blank(text: str, spans: Iterable[Span]) -> str:
    """The text with nothing readable at `spans`, which are in order."""
    parts, at = [], 0
    for start, end in spans:
        parts += [text[at:start], "\0" * (end - start)]
        at = end
    return "".join([*parts, text[at:]])


def _runs(text: str) -> list[list[Span]]:
    """Groups of digits, those together between which only separators stand."""
    runs: list[list[Span]] = []
    until = -4
    for group in _GROUP.finditer(text):
        start, end = group.span()
        if start - until < 4 and not text[until:start].strip(_SEPARATORS):
            runs[-1].append((start, end))
        else:
            runs.append([(start, end)])
        until = end
    return runs


def _long_runs(text: str) -> list[list[Span]]:
    """Those that a phone number or a card fits into."""
    return [run for run in _runs(text) if _num_digits(run) >= 7]


def _num_digits(run: list[Span]) -> int:
    return sum(end - start for start, end in run)


class _Folding(dict[int, str]):
    """For `str.translate`: what a character looks like, one ASCII character where there is one; found once each."""

    def __missing__(self, code: int) -> str:
        self[code] = folded = self._look(chr(code))
        return folded

    @staticmethod
    def _look(char: str) -> str:
        category = unicodedata.category(char)
        if category in ("Cf", "Mn", "Me"):
            return _GONE  # zero-width characters, marks such as those of a keycap
        if category == "Zs":
            return " "
        if category == "Pd":
            return "-"
        if category == "Nd":
            return str(unicodedata.decimal(char))
        form = unicodedata.normalize("NFKC", char)
        # Superscripts are footnotes: read as digits they would spoil the number that they stand behind.
        return form if len(form) == 1 and category != "No" else char


_FOLDING = _Folding(
    {ord(char): "." for char in "·•∙․。｡"} | {ord(char): "-" for char in "−˗‐‑⁃ー"} | {ord(char): "/" for char in "⁄∕"}
)


_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def _fold(text: str) -> tuple[str, list[int] | None]:
    """The text as it looks, and where each of its characters was; None for where it is."""
    if text.isascii():
        return text, None
    # Most of a text is ASCII even where not all of it is, and a pattern passes over that much faster.
    folded = _NOT_ASCII.sub(lambda part: part[0].translate(_FOLDING), text)
    if _GONE not in folded:
        return folded, None
    positions = [at for at, char in enumerate(folded) if char != _GONE]
    return folded.replace(_GONE, ""), positions


_DATE = re.compile(
    r"(?<![0-9])(?<![0-9][-/.])"
    r"(?:(?:19|20)[0-9]{2}([-/.])(?:0?[1-9]|1[0-2])\1(?:0?[1-9]|[12][0-9]|3[01])"
    r"|(?:0?[1-9]|[12][0-9]|3[01])([-/.])(?:0?[1-9]|[12][0-9]|3[01])\2(?:(?:19|20)?[0-9]{2}))"
    r"(?![0-9]|[-/.][0-9])"
    r"|(?<![0-9])20[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[01][0-9]|2[0-3])[0-5][0-9]"
    r"(?:[0-5][0-9](?:[0-9]{3})?)?(?![0-9])"
)
"""Dates, and times without separators such as 20240131235959: neither phone numbers nor cards."""


def _without_dates(text: str, runs: list[list[Span]]) -> str:
    # An international number may have a date's form behind its country code.
    national = [run for run in runs if "+" not in text[max(0, run[0][0] - 3) : run[0][0]]]
    return _blank(text, [date.span() for run in national for date in _DATE.finditer(text, run[0][0], run[-1][1])])


# ---- e-mail addresses ----

_DOMAIN = re.compile(
    r"(?P<name>[\w-]+(?:\.[\w-]+)+)|\[[0-9A-Fa-f:.]{3,45}\]",
)
_IPV4_DOMAIN = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w-])")
_LOCAL_PART = frozenset("._%+-'&~!#$*^")


def _emails(text: str) -> Iterator[Span]:
    floor = 0
    at = text.find("@")
    while at >= 0:
        end = _end_of_domain(text, at + 1)
        start = at
        if end:
            # By hand: a pattern would look at every character of a long text again and again.
            while start > floor and (text[start - 1].isalnum() or text[start - 1] in _LOCAL_PART):
                start -= 1
            while start < at and text[start] in ".'*!#-&~^$":
                start += 1
            if start == at and text[at - 1 : at] == '"':
                quote = text.rfind('"', max(floor, at - 66), at - 1)
                start = quote if quote >= 0 else at
            if start < at:
                yield start, end
                floor = end
        at = text.find("@", at + 1)


def _end_of_domain(text: str, start: int) -> int:
    """Where the domain that begins at `start` ends; 0 if there is none."""
    found = _DOMAIN.match(text, start)
    if not found:
        return 0
    if not found["name"] or _IPV4_DOMAIN.match(text, start):
        return found.end()
    labels = found["name"].split(".")
    while len(labels) > 1 and not (len(labels[-1]) > 1 and labels[-1][0].isalpha()):
        labels.pop()
    return start + len(".".join(labels)) if len(labels) > 1 else 0


# ---- IP addresses ----

_IPV4 = re.compile(r"(?<![0-9])(?<![0-9]\.)(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\.?[0-9])")
_NOT_AN_ADDRESS = re.compile(
    r"(?i)\bv$|(?:\b(?:versions?|ver|release|build|firmware|kernel|section|chapter|clause|figure|table)|§)[ .:]*$"
)
_IPV6 = re.compile(r"(?:[0-9A-Fa-f]{0,4}:){2,}[0-9A-Fa-f]{0,4}(?:(?:\.[0-9]{1,3}){3})?(?:%[0-9A-Za-z]+)?")
_IPV6_IN_USE = re.compile(r"(?i)[23][0-9a-f]{3}|f[cd][0-9a-f]{2}|fe[89ab][0-9a-f]|ff[0-9a-f]{2}")
"""First groups of addresses that are handed out: global, unique local, link-local, multicast (RFC 4291, 4193)."""


def _ipv4_addresses(text: str, runs: list[list[Span]]) -> Iterator[Span]:
    for found in (found for run in runs if len(run) >= 4 for found in _IPV4.finditer(text, run[0][0], run[-1][1])):
        if all(int(part) < 256 for part in found[0].split(".")):
            before = text[max(0, found.start() - 12) : found.start()]
            if not _NOT_AN_ADDRESS.search(before):
                yield found.span()


def _ipv6_addresses(text: str) -> Iterator[Span]:
    for found in _IPV6.finditer(text):
        if "::" not in found[0] and found[0].count(":") < 6:
            continue
        address, _, zone = found[0].partition("%")
        groups = address.split(":")
        starts = [found.start()]
        for group in groups:
            starts.append(starts[-1] + len(group) + 1)
        first = 0
        while first < len(groups):
            last = next((last for last in range(min(first + 9, len(groups)), first + 2, -1)
                         if _is_ipv6(groups[first:last])), 0)  # fmt: skip
            if last:
                at_end = last == len(groups) and zone
                yield starts[first], starts[last] - 1 + (len(zone) + 1 if at_end else 0)
            first = last or first + 1


def _is_ipv6(groups: list[str]) -> bool:
    """Whether it is an address that someone may have: `1::2` and `a::b` are rather code."""
    if "" not in groups and len(groups) < 7:
        return False  # only `::` or an IPv4 address at the end make an address shorter than eight groups
    try:
        ipaddress.IPv6Address(":".join(groups))
    except ValueError:
        return False
    given = [group for group in groups if group]
    return len(given) >= 4 or (len(given) >= 2 and bool(_IPV6_IN_USE.fullmatch(given[0])))


# ---- IBANs ----

_IBAN_FORMS = dict(
    re.findall(
        r"([A-Z]{2}) ([0-9nac]+)",
        """
AD 8n12c AE 19n AL 8n16c AO 21n AT 16n AZ 4a20c BA 16n BE 12n BF 2c22n BG 4a6n8c BH 4a14c BI 23n BJ 2c22n BR 23n1a1c
BY 4c4n16c CF 23n CG 23n CH 5n12c CI 2a22n CM 23n CR 18n CV 21n CY 8n16c CZ 20n DE 18n DJ 23n DK 14n DO 4c20n DZ 22n
EE 16n EG 25n ES 20n FI 14n FK 2a12n FO 14n FR 10n11c2n GA 23n GB 4a14n GE 2a16n GI 4a15c GL 14n GQ 23n GR 7n16c
GT 24c GW 2c19n HN 4a20n HR 17n HU 24n IE 4a14n IL 19n IQ 4a15n IR 22n IS 22n IT 1a10n12c JO 4a4n18c KM 23n KW 4a22c
KZ 3n13c LB 4n20c LC 4a24c LI 5n12c LT 16n LU 3n13c LV 4a13c LY 21n MA 24n MC 10n11c2n MD 20c ME 18n MG 23n MK 3n10c2n
ML 2c22n MN 16n MR 23n MT 4a5n18c MU 4a19n3a MZ 21n NE 2a22n NI 4a20n NL 4a10n NO 11n OM 3n16c PK 4a16c PL 24n PS 4a21c
PT 21n QA 4a21c RO 4a16c RS 18n RU 14n15c SA 2n18c SC 4a20n3a SD 14n SE 20n SI 15n SK 20n SM 1a10n12c SN 2a22n SO 19n
ST 21n SV 4a20n TD 23n TG 2a22n TL 19n TN 20n TR 5n1n16c UA 6n19c VA 18n VG 4a16n XK 16n YE 4a4n18c
""",
    )
)
"""Country and form of what follows the check digits: n digits, a letters, c either. IBAN registry of SWIFT, and
countries outside of it that use the form all the same."""

_CHARACTERS = {"n": "[0-9]", "a": "[A-Za-z]", "c": "[0-9A-Za-z]"}
_GAP = r"[ .\-]{0,3}"
_WITHOUT_GAPS = str.maketrans("", "", " .-")


@cache
def _iban_pattern(country: str) -> re.Pattern[str]:
    """What follows a country's code in its IBANs."""
    form = re.findall(r"(\d+)([nac])", _IBAN_FORMS[country])
    parts = (rf"(?:{_GAP}{_CHARACTERS[kind]}){{{count}}}" for count, kind in form)
    return re.compile(rf"[0-9]{_GAP}[0-9]" + "".join(parts))


_COUNTRY = re.compile(rf"([A-Za-z]){_GAP}([A-Za-z]){_GAP}$")


def _ibans(text: str, runs: list[list[Span]]) -> Iterator[Span]:
    floor = 0
    for run in runs:
        # Two letters stand before the check digits, and the check digits before at least eleven characters. What
        # stands before later digits of a run are digits.
        start = run[0][0]
        if (
            start < max(floor, 2)
            or len(text) < start + 13
            or not (text[start - 1].isalpha() or text[start - 1] in " .-")
        ):
            continue
        code = text[max(floor, start - 8) : start].translate(_WITHOUT_GAPS)[-2:].upper()
        if code not in _IBAN_FORMS:
            continue
        country = _COUNTRY.search(text, max(floor, start - 8), start)
        rest = _iban_pattern(code).match(text, start)
        if country and rest and _has_iban_check_digits(code, rest[0].translate(_WITHOUT_GAPS).upper()):
            yield country.start(), rest.end()
            floor = rest.end()


def _has_iban_check_digits(country: str, rest: str) -> bool:
    moved = rest[2:] + country + rest[:2]
    return int("".join(str(int(char, 36)) for char in moved)) % 97 == 1


# ---- payment cards ----


def _cards(text: str, runs: list[list[Span]]) -> Iterator[Span]:
    for groups in runs:
        digits = [text[start:end] for start, end in groups]
        if sum(map(len, digits)) < 13:
            continue
        covered: list[Span] = []
        for first in range(len(groups)):
            if first and len(digits[first]) < 4:
                continue  # no card begins so, with something else before it
            length = 0
            for last in range(first, len(groups)):
                length += len(digits[last])
                if length > 19:
                    break
                whole = last - first + 1 == len(groups)
                if length >= 13 and _is_card(text, groups[first : last + 1], digits[first : last + 1], whole):
                    covered.append((groups[first][0], groups[last][1]))
        yield from _union(covered)


def _is_card(text: str, groups: list[Span], digits: list[str], whole: bool) -> bool:
    """`whole`: nothing is beside it that could be part of the number, so any grouping will do."""
    sizes = [len(group) for group in digits]
    in_blocks = len(sizes) > 2 and (
        (sizes[0] >= 4 and len(set(sizes[:-1])) == 1 and sizes[-1] <= sizes[0]) or sizes in ([4, 6, 5], [4, 6, 4])
    )
    bare = len(sizes) == 1
    if not (in_blocks or bare or whole):
        return False
    start = groups[0][0]
    fraction = bare and re.search(r"[0-9]\.$", text[max(0, start - 2) : start])
    decimal = len(sizes) == 2 and text[groups[0][1] : groups[1][0]] == "."
    if fraction or decimal or (bare and _is_in_digest(text, groups[0])):
        return False
    # Banks and networks have the numbers from 2 to 6; others are believed only if they are written as cards are.
    return (in_blocks or digits[0][0] in "23456") and passes_luhn("".join(digits))


def _is_in_digest(text: str, digits: Span) -> bool:
    """Whether the digits are a part of a long hexadecimal number."""
    start, end = digits
    before = re.search(r"[0-9a-fA-F]*$", text[max(0, start - 64) : start])
    behind = _HEX.match(text, end)
    around = len(before[0] if before else "") + len(behind[0] if behind else "")
    return around > 0 and around + end - start >= 24


_HEX = re.compile(r"[0-9a-fA-F]*")


def passes_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    odd, even = digits[-1::-2], digits[-2::-2]
    return (sum(map(int, odd)) + sum(sum(divmod(2 * int(digit), 10)) for digit in even)) % 10 == 0


def _union(spans: list[Span]) -> list[Span]:
    """Spans that overlap taken together: where two readings are valid, neither may shine through."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined
