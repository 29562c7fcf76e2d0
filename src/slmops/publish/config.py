"""Settings of publish."""

from __future__ import annotations

from slmops.config import Channel, Config, StoreUri


class PublishConfig(Config):
    """Where a release goes."""

    store_uri: StoreUri
    """s3://bucket/prefix, or a local folder."""
    channel: Channel = "default"
    """The channel (a pool of edge nodes) that is pointed to the release."""
