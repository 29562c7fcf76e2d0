"""classification: one label out of several."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field, field_validator

from slmops.errors import ConfigError
from slmops.records import ChatRecord
from slmops.tasks.interface import Pairs, Rejected, Task, instructed, mean, text_of
from slmops.teachers.interface import Prompt

_LABELS_LINE = re.compile(
    r"^[ \t]*(?:labels|options|classes|categories)[ \t]*:[ \t]*(\S.*)$", re.IGNORECASE | re.MULTILINE
)
_SAID_LINE = re.compile(r"^\W*(?:answer|label|class|category)\W*:\W*(\S.*)$", re.IGNORECASE | re.MULTILINE)
_NEGATION = re.compile(r"\b(?:not|nor|neither|never|cannot|isn't|doesn't|don't|can't|except|rather than|instead of)\b")
_OUTER = " \t\r\n.,;:!?\"'`*_“”‘’„«»()[]<>"
_CLOSING_QUOTES = "\"'`*_”’»"
_BREAKS = (",", ".", ":", ";", " -", " –", " —", " (")


class Classification(Task):
    """The answer is one of some labels, and nothing else."""

    labels: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """The labels; if empty, each prompt names its own in a line such as `Labels: a, b, c`."""

    @field_validator("labels")
    @classmethod
    def _differ(cls, labels: list[str]) -> list[str]:
        if twice := [name for name, count in Counter(map(_plain, labels)).items() if count > 1]:
            raise ValueError(f"labels must differ by more than case and quotes, found {', '.join(twice)} twice")
        if len(labels) == 1:
            raise ValueError(f"labels must be two or more, found only {labels[0]}")
        return labels

    def ask(self, record: ChatRecord) -> Prompt:
        labels = self.labels_of(record)
        if not labels:
            raise ConfigError(
                "a prompt of a classification names no labels, and neither does task_settings; give "
                '{"classification": {"labels": [...]}}, or put a line `Labels: a, b, c` into the prompts'
            )
        return instructed(
            record.prompt, f"Answer with exactly one of these labels and nothing else: {', '.join(labels)}"
        )

    def labels_of(self, record: ChatRecord) -> list[str]:
        """The labels of the settings, else those of the prompt's last line that lists some."""
        if self.labels:
            return list(self.labels)
        lines = _LABELS_LINE.findall(text_of(record))
        return [label for part in lines[-1].split(",") if (label := part.strip(_OUTER))] if lines else []

    def read(self, text: str, record: ChatRecord) -> str:
        return read_label(text, self.labels_of(record))

    def correct(self, completion: str, reference: str) -> bool:
        return self._label(completion) == self._label(reference)

    def metrics(self, pairs: Pairs) -> dict[str, float]:
        """Accuracy, and F1 of each reference's label, all labels alike."""
        labels = [(self._label(answer), self._label(reference)) for answer, reference in pairs]
        f1 = []
        for label in sorted({reference for _, reference in labels}):
            right = sum(answer == reference == label for answer, reference in labels)
            f1.append(2 * right / sum((answer == label) + (reference == label) for answer, reference in labels))
        return {
            "label_accuracy": mean([float(answer == reference) for answer, reference in labels]),
            "macro_f1": mean(f1),
        }

    def _label(self, text: str) -> str:
        """The label in `text` in its plain form; if there is none, all of `text`, which then is no label."""
        try:
            return _plain(read_label(text, self.labels))
        except Rejected:
            return _plain(text)


def read_label(text: str, labels: Sequence[str]) -> str:
    """The one of `labels` that `text` says, whatever its case, quotes and full stop.

    It is all that the text says, or what a last line `Answer: ...` says. Else it is the only label in the text, if the
    text opens with it (`No, because ...`) or negates nothing. Never is it one of two.

    Raises:
        Rejected: `no_label`, `several_labels`.
    """
    by_plain = {_plain(label): label for label in labels}
    said = _SAID_LINE.findall(text)
    for whole in (text, *said[-1:]):
        if label := by_plain.get(_plain(whole)):
            return label
    plain, pattern = _plain(text), _any_of(by_plain)
    found = set(pattern.findall(plain))
    if len(found) > 1:
        raise Rejected("several_labels")
    if not found:
        raise Rejected("no_label")
    opening = pattern.match(plain)
    opens = opening is not None and plain[opening.end() :].lstrip(_CLOSING_QUOTES).startswith(_BREAKS)
    if not opens and _NEGATION.search(pattern.sub(" ", plain)):
        raise Rejected("no_label")
    return by_plain[found.pop()]


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace("’", "'").strip(_OUTER).split())


def _any_of(labels: Iterable[str]) -> re.Pattern[str]:
    """Finds labels as whole words; of labels within labels the longest. Without labels it finds nothing."""
    longest_first = sorted(labels, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)" if longest_first else r"(?!)")
