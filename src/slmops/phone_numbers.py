"""Phone numbers in text, by how people write them and by what phonenumbers knows of a region's numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import phonenumbers
from phonenumbers import NumberParseException, PhoneMetadata, PhoneNumber, PhoneNumberType

from slmops.errors import ConfigError

Span = tuple[int, int]

_WORD = re.compile(r"[^\W\d_]+|#")
_CONTEXT = frozenset(
    _WORD.findall(
        """phone telephone téléphone telefon teléfono telefono telefone telefoon tel mobile mobil mobiel móvil cell fax
        sms cellphone whatsapp handy handynummer telefonnummer rufnummer mobilnummer portable call ring dial reach
        hotline contact"""
    )
)
"""Words that say that digits behind them are a phone number."""
_OTHER_NUMBER = frozenset(
    _WORD.findall(
        """# isbn issn ean upc sku order invoice ticket case tracking serial ref reference article item part model batch
        lot id bestellnummer bestellung rechnung rechnungsnummer auftrag kundennummer artikelnummer commande facture"""
    )
)
"""Words that say that they are something else."""
_FILLERS = frozenset(["no", "nr", "number", "num", "code", "id", "#"])
"""What may stand between such a word and the digits."""
_CONTEXT_CHARS = 40

_SUBSCRIBERS = (PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE, PhoneNumberType.FIXED_LINE_OR_MOBILE)
_NORTH_AMERICAN = re.compile(r"1?[2-9][0-9]{9}")
_MAX_DIGITS = 17
"""Fifteen by ITU-T E.164, and two for 00."""
_MAX_NATIONAL_DIGITS = 12


class PhoneFinder:
    """Finds international numbers, and national ones of `regions` (ISO 3166 codes).

    Raises:
        ConfigError: an unknown region.
    """

    def __init__(self, regions: Iterable[str]) -> None:
        self._trunk: list[tuple[str, str]] = []
        """(region, what its numbers begin with inside the country)."""
        self._bare: list[str] = []
        """Regions whose numbers begin with nothing."""
        self._north_american = False
        for region in regions:
            metadata = PhoneMetadata.metadata_for_region(region, None)
            if metadata is None:
                raise ConfigError(f"no phone numbers are known of region {region!r}; use ISO 3166 codes such as US, DE")
            if metadata.country_code == 1:
                self._north_american = True
            elif metadata.national_prefix:
                self._trunk.append((region, metadata.national_prefix))
            else:
                self._bare.append(region)
        self._prefixes = ("00", *(prefix for _, prefix in self._trunk))

    def spans(self, text: str, runs: Iterable[Sequence[Span]]) -> Iterator[Span]:
        """Where phone numbers stand in `text`, which has plain spaces and dashes.

        `runs` are the groups of digits that stand close enough together for one number, or for several.
        """
        for groups in runs:
            candidate = _Candidate(text, groups)
            first = 0
            while first < len(candidate.groups):
                last = self._match(candidate, first)
                if last is None:
                    first += 1
                    continue
                yield candidate.start(first), candidate.groups[last][1]
                first = last + 1

    def _match(self, candidate: _Candidate, first: int) -> int | None:
        """The last group of the number that begins with the group `first`: as long as possible; None for no number."""
        if not self._may_begin(candidate, first):
            return None
        digits, ends = "", []
        for last in range(first, len(candidate.groups)):
            # A bracket within a number stands around its second group: +49 (0)30, 1 (415).
            if last > first + 1 and candidate.opens_bracket(last):
                break
            digits += candidate.digits(last)
            if len(digits) > _MAX_DIGITS:
                break
            ends.append((last, digits))
        for last, digits in reversed(ends):
            if len(digits) >= 7 and self._is_phone(candidate, first, last, digits):
                return last
        return None

    def _may_begin(self, candidate: _Candidate, first: int) -> bool:
        """Rules out most groups of a long row of numbers, so that each is not tried with all that follow it."""
        if self._bare or (first == 0 and (candidate.has_plus(0) or candidate.has_context)):
            return True
        digits = candidate.digits(first)
        if digits.startswith(self._prefixes) and (len(digits) > 1 or candidate.opens_bracket(first)):
            return True
        if digits == "1" and first + 1 < len(candidate.groups):
            digits = candidate.digits(first + 1)
        return self._north_american and len(digits) in (3, 10, 11)

    def _is_phone(self, candidate: _Candidate, first: int, last: int, digits: str) -> bool:
        if candidate.has_plus(first) and _is_international(digits):
            return True
        if digits.startswith("00"):
            return len(digits) >= 10 and _is_valid("+" + digits[2:], None)
        sizes = [end - start for start, end in candidate.groups[first : last + 1]]
        return (
            (self._north_american and self._is_north_american(candidate, first, sizes, digits))
            or self._is_behind_trunk_prefix(candidate, first, sizes, digits)
            or any(self._is_without_prefix(candidate, first, sizes, digits, region) for region in self._bare)
        )

    @staticmethod
    def _is_north_american(candidate: _Candidate, first: int, sizes: list[int], digits: str) -> bool:
        """(415) 555-2671 and the like by form, also where no subscriber has it; bare digits behind a word."""
        if not _NORTH_AMERICAN.fullmatch(digits) or (len(digits) == 11) != digits.startswith("1"):
            return False
        if sizes in ([3, 3, 4], [1, 3, 3, 4]) or candidate.opens_bracket(first):
            return True
        return candidate.has_context and (len(sizes) > 1 or _is_valid(digits, "US"))

    def _is_behind_trunk_prefix(self, candidate: _Candidate, first: int, sizes: list[int], digits: str) -> bool:
        regions = [region for region, prefix in self._trunk if digits.startswith(prefix)]
        if not regions or len(digits) > _MAX_NATIONAL_DIGITS or candidate.is_fraction(first):
            return False
        if sizes[0] < 2 and not candidate.opens_bracket(first):
            return False
        bare = len(sizes) == 1
        if not candidate.has_context:
            if len(digits) < (10 if bare else 9):
                return False
            if bare and (candidate.is_other_number or candidate.touches_letter(first)):
                return False
        return any(_is_valid(digits, region, subscribers=bare) for region in regions)

    @staticmethod
    def _is_without_prefix(candidate: _Candidate, first: int, sizes: list[int], digits: str, region: str) -> bool:
        if not candidate.has_context and (len(sizes) == 1 or all(size == 3 for size in sizes[1:])):
            return False  # digits by threes are rather an amount
        return (
            8 <= len(digits) <= _MAX_NATIONAL_DIGITS and not candidate.is_fraction(first) and _is_valid(digits, region)
        )


class _Candidate:
    """Digits in a text, and what stands around them."""

    def __init__(self, text: str, groups: Sequence[Span]) -> None:
        self._text, self.groups = text, groups

    @cached_property
    def has_context(self) -> bool:
        return not _CONTEXT.isdisjoint(self._words)

    @cached_property
    def is_other_number(self) -> bool:
        words = self._words
        if len(words) > 1 and words[-1] in _FILLERS:
            return words[-2] in _OTHER_NUMBER or words[-1] == "#"
        return bool(words) and words[-1] in _OTHER_NUMBER

    @cached_property
    def _words(self) -> list[str]:
        """What stands before the digits; a placeholder says nothing about what follows it."""
        start = self.groups[0][0]
        before = self._text[max(0, start - _CONTEXT_CHARS) : start].replace("[PHONE]", "")
        return _WORD.findall(before.lower())

    def digits(self, group: int) -> str:
        start, end = self.groups[group]
        return self._text[start:end]

    def start(self, first: int) -> int:
        """Where the number begins, with its plus sign and bracket."""
        start = self.groups[first][0]
        prefix = re.search(r"(?:\+ ?)?\(?$|\( ?\+ ?$", self._text[max(0, start - 4) : start])
        return start - len(prefix[0]) if prefix else start

    def has_plus(self, first: int) -> bool:
        start = self.groups[first][0]
        return bool(re.search(r"\+ ?\(? ?$", self._text[max(0, start - 4) : start]))

    def opens_bracket(self, first: int) -> bool:
        start = self.groups[first][0]
        return self._text[max(0, start - 1) : start] == "("

    def touches_letter(self, first: int) -> bool:
        start, end = self.groups[first]
        return self._text[max(0, start - 1) : start].isalpha() or self._text[end : end + 1].isalpha()

    def is_fraction(self, first: int) -> bool:
        start = self.groups[first][0]
        return bool(re.search(r"[0-9]\.$", self._text[max(0, start - 2) : start]))


def _is_international(digits: str) -> bool:
    """Behind a plus sign: valid, or long enough that only a made-up number is meant."""
    number = _parse("+" + digits, None)
    if number is None:
        return False
    return phonenumbers.is_valid_number(number) or (len(digits) >= 10 and phonenumbers.is_possible_number(number))


def _is_valid(digits: str, region: str | None, subscribers: bool = False) -> bool:
    number = _parse(digits, region)
    if number is None:
        return False
    if subscribers:
        return phonenumbers.number_type(number) in _SUBSCRIBERS
    return phonenumbers.is_valid_number(number)


def _parse(digits: str, region: str | None) -> PhoneNumber | None:
    try:
        return phonenumbers.parse(digits, region)
    except NumberParseException:
        return None
