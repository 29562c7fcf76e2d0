"""Settings of withhold_labels."""

from __future__ import annotations

from pydantic import Field

from slmops.config import Config


class WithholdLabelsConfig(Config):
    """A few rows of each class keep their label, and all others are prompts for a teacher."""

    rows_per_class: int = Field(default=10, ge=1, le=1_000_000)
    """Labelled rows of each class: the first ones, in the dataset's (shuffled) order."""
    no_label: str = Field(default="?", min_length=1)
    """The answer of a row without a label: as it comes from the data, and as it is written here."""
