"""Settings of fetch_champion."""

from __future__ import annotations

from slmops.config import Channel, Config, StoreUri

CHAMPION = "champion"
"""Name of the variant in the artifact, so that a pipeline can name it; its release calls it otherwise."""


class FetchChampionConfig(Config):
    """Whose model is fetched."""

    store_uri: StoreUri
    """The store that releases go to: s3://bucket/prefix, or a local folder."""
    channel: Channel = "default"
    """The channel (a pool of edge nodes) whose current release is looked at."""
