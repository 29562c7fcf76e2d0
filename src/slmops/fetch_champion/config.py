"""Settings of fetch_champion."""

from __future__ import annotations

from pydantic import Field

from slmops.config import Config

CHAMPION = "champion"
"""Name of the variant in the artifact, so that a pipeline can name it; its release calls it otherwise."""


class FetchChampionConfig(Config):
    """Whose model is fetched."""

    store_uri: str = Field(min_length=1, pattern=r"^(s3://[^/]+(/.*)?|/.*|\.{1,2}/.*)$")
    """The store that releases go to: s3://bucket/prefix, or a local folder."""
    channel: str = Field(default="default", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """The channel (a pool of edge nodes) whose current release is looked at."""
