"""The metadata that makes a release visible: The Update Framework's roles, and one object that ever changes.

`v1/metadata/timestamp.json` names `<n>.snapshot.json`, that names `<n>.targets.json`, and that names the current file
of each channel, `v1/channels/<channel>/<sha256>.channel.json`; each by length and hash. A publisher writes the new
files beside the old ones and then moves the timestamp with a compare-and-swap: readers see all of a release or nothing.

The files have TUF's own layout (https://theupdateframework.github.io/specification/latest, consistent snapshots), but
**nothing is signed yet**: until signing lands, the store's own access control is the only protection against someone
who writes into it. The hashes protect against damage, not against an attacker. For the same reason `expires` is set
and not looked at.
"""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from slmops.errors import CorruptDownload, DataError, StoreUnavailable
from slmops.progress import log
from slmops.release.format import Channel, parse
from slmops.storage import Store

TIMESTAMP_KEY = "v1/metadata/timestamp.json"
MAX_METADATA_BYTES = 4 * 1024 * 1024
MAX_CHANNEL_BYTES = 64 * 1024
VALID_DAYS = 365
MAX_RACES = 50
MAX_PAUSE_S = 1.0

Role = TypeVar("Role", Timestamp, Snapshot, Targets)


@dataclass(frozen=True)
class View:
    """What the timestamp shows at one moment."""

    etag: str | None
    """Of the timestamp; None if nothing was ever published."""
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets


def read_view(store: Store) -> View:
    """Follow the timestamp, verifying length and hash of everything it names.

    Raises:
        CorruptDownload: something does not match.
        DataError: something is no metadata.
    """
    found = store.stat(TIMESTAMP_KEY)
    if found is None:
        return View(None, Timestamp(), Snapshot(), Targets())
    # The etag is taken first: if the timestamp moves in between, the compare-and-swap fails, as it must.
    timestamp = _role(Timestamp, store.read(TIMESTAMP_KEY, MAX_METADATA_BYTES), TIMESTAMP_KEY)
    snapshot_file = timestamp.snapshot_meta
    snapshot_key = f"v1/metadata/{snapshot_file.version}.snapshot.json"
    snapshot = _role(Snapshot, _read_checked(store, snapshot_key, snapshot_file), snapshot_key)
    targets_file = snapshot.meta.get("targets.json")
    if targets_file is None:
        raise DataError(f"{store.uri}: {snapshot_key} names no targets; publish again")
    targets_key = f"v1/metadata/{targets_file.version}.targets.json"
    targets = _role(Targets, _read_checked(store, targets_key, targets_file), targets_key)
    return View(found.etag, timestamp, snapshot, targets)


def read_channel(store: Store, channel: str) -> Channel | None:
    """What `channel` points to; None if nothing was published to it.

    Raises:
        CorruptDownload, DataError: as `read_view`.
    """
    return _channel_of(store, read_view(store), channel)


def point_channel(store: Store, channel: str, release_digest: str) -> tuple[Channel, bool]:
    """Point `channel` to a release that is complete in the store; return what it points to, and whether it changed.

    The loser of a race starts again from the winner's timestamp, so no other publisher's change is ever lost.

    Raises:
        StoreUnavailable: too many races in a row were lost.
    """
    for attempt in range(MAX_RACES):
        view = read_view(store)
        current = _channel_of(store, view, channel)
        if current is not None and current.release_digest == release_digest:
            return current, False
        wanted = Channel(release_digest=release_digest, sequence=current.sequence + 1 if current else 1)
        if _move(store, view, channel, wanted):
            return wanted, True
        pause_s = random.uniform(0, min(MAX_PAUSE_S, 0.05 * 2**attempt))
        log.info("another publisher moved %s first; trying again in %.2f s", TIMESTAMP_KEY, pause_s)
        time.sleep(pause_s)
    raise StoreUnavailable(f"{store.uri}: lost {MAX_RACES} races for {TIMESTAMP_KEY}; publish again when it is quieter")


def channel_key(channel: str, digest: str) -> str:
    return f"v1/channels/{channel}/{digest}.channel.json"


def _move(store: Store, view: View, channel: str, wanted: Channel) -> bool:
    """Write the new channel, targets and snapshot beside the old ones; then swap the timestamp."""
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=VALID_DAYS)
    data = wanted.to_bytes()
    store.create(channel_key(channel, wanted.digest), data)

    targets = Targets(expires=expires, targets=dict(view.targets.targets))
    target_path = _target_path(channel)
    targets.targets[target_path] = TargetFile(len(data), {"sha256": hashlib.sha256(data).hexdigest()}, target_path)
    targets_file = _create_version(store, targets, view.targets.version if view.etag else 0, "targets")

    snapshot = Snapshot(expires=expires, meta={"targets.json": targets_file})
    snapshot_file = _create_version(store, snapshot, view.snapshot.version if view.etag else 0, "snapshot")

    version = view.timestamp.version + 1 if view.etag else 1
    timestamp = Timestamp(version=version, expires=expires, snapshot_meta=snapshot_file)
    return store.replace(TIMESTAMP_KEY, _to_bytes(timestamp), if_match=view.etag)


def _create_version(store: Store, role: Role, last_version: int, name: str) -> MetaFile:
    """Write `role` under the next free version.

    A publisher that lost a race, or was killed before it moved the timestamp, leaves versions that nobody names.
    """
    version = last_version
    while True:
        version += 1
        role.version = version
        data = _to_bytes(role)
        if store.create(f"v1/metadata/{version}.{name}.json", data):
            return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


def _channel_of(store: Store, view: View, channel: str) -> Channel | None:
    target = view.targets.targets.get(_target_path(channel))
    if target is None:
        return None
    key = channel_key(channel, target.hashes.get("sha256", ""))
    return parse(Channel, _read_checked(store, key, target, MAX_CHANNEL_BYTES), f"{store.uri}: {key}")


def _read_checked(
    store: Store, key: str, expected: MetaFile | TargetFile, max_bytes: int = MAX_METADATA_BYTES
) -> bytes:
    if not expected.hashes or "sha256" not in expected.hashes or expected.length is None:
        raise DataError(f"{store.uri}: the metadata gives no length and SHA-256 of {key}; publish again")
    data = store.read(key, max_bytes)
    try:
        expected.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        raise CorruptDownload(
            f"{store.uri}: {key} does not match the metadata that names it; try again, or publish again"
        ) from None
    return data


def _role(role: type[Role], data: bytes, key: str) -> Role:
    try:
        signed = Metadata.from_bytes(data).signed
    except (DeserializationError, RecursionError):
        raise DataError(f"{key} is no TUF metadata; check who writes into this store") from None
    if not isinstance(signed, role):
        raise DataError(f"{key} holds TUF's role {signed.type}; check who writes into this store")
    return signed


def _to_bytes(role: Role) -> bytes:
    return Metadata(role, signatures={}).to_bytes(JSONSerializer(compact=True))


def _target_path(channel: str) -> str:
    return f"{channel}/channel.json"
