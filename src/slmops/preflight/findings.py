"""What a check found: facts, warnings, and everything that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from slmops.errors import SlmopsError, TransientError


@dataclass
class Findings:
    """Collected by one check, or of all checks together."""

    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What the user has to fix."""
    unavailable: list[str] = field(default_factory=list)
    """What does not answer now."""

    @contextmanager
    def about(self, subject: str) -> Iterator[None]:
        """Take down an error of the body as a line about `subject`, so that the next check goes on."""
        try:
            yield
        except TransientError as error:
            self.unavailable.append(f"{subject}: {error}")
        except SlmopsError as error:
            self.problems.append(f"{subject}: {error}")

    def add(self, other: Findings) -> None:
        """Take over all of `other`."""
        self.facts |= other.facts
        self.warnings += other.warnings
        self.problems += other.problems
        self.unavailable += other.unavailable
