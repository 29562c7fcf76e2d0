"""What both methods ask with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from slmops.checks import Checks
from slmops.records import ChatRecord, Message, Provenance, id_of
from slmops.tasks.interface import Rejected
from slmops.tasks.registry import Tasks
from slmops.teachers.interface import STOP, Answer
from slmops.teachers.mixture import Mixture

NO_REFERENCE = "?"
"""The last turn of a record that has no answer yet."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for one teacher."""

    teacher: str
    messages: tuple[Mapping[str, str], ...]
    seed: int


Ask = Callable[[Sequence[Request]], list[Answer | None]]
"""Answers in the order of the requests; None where there is none."""


@dataclass
class Desk:
    """Whom to ask, what to take, and what was dropped so far."""

    ask: Ask
    mixture: Mixture
    tasks: Tasks
    checks: Checks
    drops: Counter[str] = field(default_factory=Counter)
    """Prompts and answers that were dropped, by reason."""
    num_requests: int = 0
    """Requests for prompts, answers not counted."""

    def finished_row(self, prompt: ChatRecord, text: str, provenance: Provenance) -> ChatRecord | None:
        """The row that `text` makes of `prompt`; None, and counted, if it fails its task or a check."""
        try:
            completion = self.tasks.of(prompt).parse(text, prompt)
        except Rejected as rejected:
            self.drops[rejected.reason] += 1
            return None
        if reason := self.checks.reason(prompt, completion):
            self.drops[reason] += 1
            return None
        messages = (*prompt.messages[:-1], Message(role="assistant", content=completion))
        return prompt.model_copy(update={"id": id_of(messages), "messages": messages, "provenance": provenance})

    def usable(self, answer: Answer | None) -> bool:
        """Whether an answer came to its end; one that did not is counted. None was counted by who asked."""
        if answer is not None and answer.finish_reason != STOP:
            self.drops["truncated"] += 1
            return False
        return answer is not None


def unanswered(task: str, turns: Sequence[tuple[str, str]]) -> ChatRecord:
    """A record of these turns (role, content) that waits for its answer."""
    messages = tuple(
        Message.model_validate({"role": role, "content": content})
        for role, content in (*turns, ("assistant", NO_REFERENCE))
    )
    return ChatRecord(id=id_of(messages), messages=messages, task=task)
