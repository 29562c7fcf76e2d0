"""Promote: copy the release of a channel from the store that pipelines write to the one that edge nodes read.

The two have different credentials, and only this command sees both: what trains a model cannot change what nodes run,
it can only offer a release.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from slmops.errors import CorruptDownload, UserError, explain_os_errors
from slmops.progress import log
from slmops.release.deposit import deposit
from slmops.release.format import (
    GENAI_CONFIG,
    Channel,
    Manifest,
    Release,
    ReleaseFile,
    blob_key,
    manifest_key,
    read_verified,
    refuse_native_code,
    release_key,
)
from slmops.release.metadata import point_channel, read_channel
from slmops.storage import Store


@dataclass(frozen=True)
class Promotion:
    """What a channel of the destination points to now."""

    channel: Channel
    changed: bool
    bytes_copied: int


def promote(source: Store, destination: Store, channel: str) -> Promotion | None:
    """Copy what `channel` of `source` points to, each byte verified; None if nothing was ever published to it.

    Doing it again changes nothing. The release's own format admits no verdict but `pass`.

    Raises:
        UserError: source and destination are the same store.
        CorruptDownload: bytes do not match their digest.
        DataError: an object is not what the format allows, or a model names native code.
        StoreError, StoreUnavailable: a store refuses, or does not answer.
    """
    if source.uri == destination.uri:
        raise UserError(f"--from and --to are both {source.uri}; give two stores")
    offered = read_channel(source, channel)
    if offered is None:
        log.info("channel %s of %s has no release yet", channel, source.uri)
        return None
    digest = offered.release_digest
    release = read_verified(source, Release, release_key(digest), digest)
    manifests = [
        read_verified(source, Manifest, manifest_key(variant.manifest_digest), variant.manifest_digest)
        for variant in release.variants
    ]
    destination.probe()
    with tempfile.TemporaryDirectory(prefix="slmops-promote-") as folder:
        copied = deposit(destination, release, manifests, lambda file: _fetch(source, file, Path(folder)))
    moved, changed = point_channel(destination, channel, digest)
    return Promotion(moved, changed, copied)


def _fetch(store: Store, file: ReleaseFile, folder: Path) -> Path:
    """A verified copy of one file."""
    path, whole = folder / file.sha256, hashlib.sha256()
    with explain_os_errors(path), open(path, "wb") as copy:
        for index in range(len(file.ranges)):
            data = store.read_range(blob_key(file.sha256), *file.range_at(index))
            whole.update(data)
            copy.write(data)
    if whole.hexdigest() != file.sha256:
        raise CorruptDownload(
            f"{store.uri}: {blob_key(file.sha256)} (file {file.path}) does not have the digest in its name; try again, "
            "or remove that object and publish again"
        )
    if file.path == GENAI_CONFIG:
        refuse_native_code(path.read_bytes(), f"{store.uri}: {file.path}")
    return path
