"""KFP's local cache, with the artifacts of slmops known by what is in them.

KFP knows an artifact by where it lies. What comes out of a step that always runs lies somewhere else each time, and all
that follows from it would run again, though it may be the same, bit by bit: such as the champion of a channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PLACE = ("uri", "name")
OURS = {"kind", "digest", "slmops_version"}
"""What a sidecar puts into the metadata of its artifact."""


@contextmanager
def keyed_by_content() -> Iterator[None]:
    """Within the block, a task's cache key has digest and figures of our artifacts, and not their places."""
    from kfp import dsl
    from kfp.local.cache import LocalCache

    before = LocalCache._serialize_value_for_key

    def without_place(value: Any) -> Any:
        serialized = before(value)
        if isinstance(value, dsl.Artifact) and value.metadata.keys() >= OURS:
            return {name: part for name, part in serialized.items() if name not in PLACE}
        return serialized

    LocalCache._serialize_value_for_key = staticmethod(without_place)
    try:
        yield
    finally:
        LocalCache._serialize_value_for_key = staticmethod(before)
