"""mathematics: steps, then a final answer that is compared as a number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from pydantic import Field

from slmops.records import ChatRecord
from slmops.tasks.interface import Pairs, Rejected, Task, instructed, mean
from slmops.teachers.interface import Prompt

MAX_CHARS = 200
"""A longer final answer is no answer, but prose."""

_ANSWER_LINE = re.compile(r"(?:\banswer\b(?:[^\n:=]{0,20}[:=]|\s+is\b)|####)[ \t*$]*(\S[^\n]*)", re.IGNORECASE)
_TEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_TEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_NUMBER = re.compile(
    rf"""^(?:[a-z]\w{{0,2}}\s*=\s*)?                      # x =
    (?P<sign>[-+]?)\s*(?:us)?[$€£¥]?\s*
    (?:(?P<whole>\d+)[ ]+(?=\d+\s*/\s*\d))?               # 1 1/2
    (?P<top>{_DECIMAL})
    (?:e(?P<exponent>[-+]?\d{{1,2}}))?
    (?:\s*/\s*(?P<bottom>{_DECIMAL}))?
    \s*(?P<percent>%|percent\b)?
    (?P<unit>[^\d%]*(?:\^?[23²³])?)$""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Number:
    """A final answer as a number; its unit is off."""

    value: Fraction
    percent: bool = False


class Mathematics(Task):
    """Chain of thought (Wei et al. 2022, https://arxiv.org/abs/2201.11903) that ends with the answer."""

    reference: Literal["check", "ignore"] = "check"
    """`check`: an answer other than the row's own is dropped, where the row has a final one; `ignore`: it may stay."""
    relative_tolerance: float = Field(default=1e-6, ge=0, lt=0.1)
    """How far two numbers may lie apart that count as the same, as a share of the larger."""

    def ask(self, record: ChatRecord) -> Prompt:
        return instructed(record.prompt, "Think step by step. Then end with one line: Answer: <the final answer>")

    def read(self, text: str, record: ChatRecord) -> str:
        if final_answer(text) is None:
            raise Rejected("no_final_answer")
        return text.strip()

    def check(self, completion: str, record: ChatRecord) -> str | None:
        if self.reference == "ignore" or final_answer(record.completion) is None:
            return None
        return None if self.correct(completion, record.completion) else "wrong_answer"

    def correct(self, completion: str, reference: str) -> bool:
        answer, wanted = final_answer(completion), final_answer(reference)
        if answer is None or wanted is None:
            return False
        one, other = parse_number(answer), parse_number(wanted)
        if one is None or other is None:
            return one is other and _plain(answer) == _plain(wanted)
        return self._same(one, other)

    def metrics(self, pairs: Pairs) -> dict[str, float]:
        """Share of right final answers, and of texts that have one."""
        return {
            "final_answer_accuracy": mean([float(self.correct(answer, reference)) for answer, reference in pairs]),
            "final_answer_fraction": mean([float(final_answer(answer) is not None) for answer, _ in pairs]),
        }

    def _same(self, one: Number, other: Number) -> bool:
        """50 % is 50 without its unit, and 0.5 as a number: both count."""
        if self._close(one.value, other.value):
            return True
        if one.percent == other.percent:
            return False
        return self._close(one.value / (100 if one.percent else 1), other.value / (100 if other.percent else 1))

    def _close(self, one: Fraction, other: Fraction) -> bool:
        return abs(one - other) <= Fraction(self.relative_tolerance) * max(abs(one), abs(other))


def final_answer(text: str) -> str | None:
    r"""The last \boxed{...}, else what follows the last `Answer:` or `####`, else all of a text that is one number."""
    if (boxed := _last_boxed(text)) is not None:
        found = boxed
    elif lines := _ANSWER_LINE.findall(text):
        found = lines[-1]
    elif parse_number(text):
        found = text
    else:
        return None
    found = found.strip().strip("*$").strip()
    return found if 0 < len(found) <= MAX_CHARS else None


def parse_number(text: str) -> Number | None:
    """A number out of `1,234.50`, `$3`, `1 1/2`, `\\frac{1}{2}`, `50 %`, `12 km/h`; None if it is none or several."""
    if len(text) > MAX_CHARS:
        return None
    plain = _TEX_TEXT.sub(r" \1", _TEX_FRACTION.sub(r" \1/\2", text))
    plain = plain.replace("\\$", "$").replace("\\%", "%").replace("\\,", "").replace("−", "-").replace("{,}", ",")
    found = _NUMBER.match(plain.strip(" \t\r\n.$*()").casefold())
    if not found or not found["top"]:
        return None
    try:
        value = _fraction(found["top"]) * Fraction(10) ** int(found["exponent"] or 0)
        if found["bottom"]:
            value /= _fraction(found["bottom"])
    except ZeroDivisionError:
        return None
    value += int(found["whole"] or 0)
    return Number(-value if found["sign"] == "-" else value, percent=bool(found["percent"]))


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _last_boxed(text: str) -> str | None:
    r"""What is in the braces of the last \boxed; None if there is none, or its braces never close."""
    start = text.rfind("\\boxed{")
    depth = 0
    for position in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None


def _plain(text: str) -> str:
    return "".join(text.casefold().strip(" .$").split())
