"""Settings of publish."""

from __future__ import annotations

from pydantic import Field

from slmops.config import Config


class PublishConfig(Config):
    """Where a release goes."""

    store_uri: str = Field(min_length=1, pattern=r"^(s3://[^/]+(/.*)?|/.*|\.{1,2}/.*)$")
    """s3://bucket/prefix, or a local folder."""
    channel: str = Field(default="default", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """The channel (a pool of edge nodes) that is pointed to the release."""
