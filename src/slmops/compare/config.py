"""Settings of compare."""

from __future__ import annotations

from pydantic import Field

from slmops.config import Config


class CompareConfig(Config):
    """How sure a comparison wants to be, and how many rows it shows."""

    num_resamples: int = Field(default=10_000, ge=100, le=1_000_000)
    """How often the test rows are drawn anew, with replacement, to see how far chance moves the figures."""
    confidence_level: float = Field(default=0.95, ge=0.5, le=0.999)
    """Share of the resamples that an interval holds, 0.5 to 0.999."""
    seed: int = Field(default=0, ge=0)
    """Start of the random draws."""
    max_examples: int = Field(default=4, ge=0, le=100)
    """Most rows shown of each kind: both right, only the teacher, only the student, neither."""
