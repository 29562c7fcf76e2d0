"""Settings of merge_responses."""

from __future__ import annotations

from pydantic import Field

from slmops.config import Config


class MergeResponsesConfig(Config):
    """The shards of generate_responses become one dataset."""

    min_rows: int = Field(default=1, ge=1)
    """The step fails if all shards together have fewer rows than this."""
