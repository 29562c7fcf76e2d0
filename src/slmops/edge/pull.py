"""Pull: bring an edge node to the release that its channel points to."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slmops.artifacts import file_digest
from slmops.edge import node
from slmops.edge.node import Installed, State
from slmops.errors import ArtifactError, DataError, StoreError, TransientError, explain_os_errors
from slmops.progress import log
from slmops.release.fetch import fetch_files
from slmops.release.format import Channel, Manifest, Release, read_verified, release_key
from slmops.release.machine import choose, this_machine
from slmops.release.metadata import read_channel
from slmops.storage import Store, open_store, sync_directory, write_atomically


@dataclass(frozen=True)
class PullResult:
    """What a pull did."""

    release_digest: str
    variant: str
    path: Path
    """The release's directory; `<root>/current` leads to it."""
    bytes_fetched: int
    """Bytes of files that came from the store in this run."""
    switched: bool
    """Whether the node ran another release before."""


def pull(store_uri: str, channel: str, root: Path) -> PullResult:
    """Resolve the channel, choose a variant for this machine, fetch and verify it, and switch to it.

    It can be killed at any point: `current` leads to a complete release or does not exist, and the next run fetches
    only what is missing.

    Raises:
        StoreError: nothing was published to the channel, or it went back to an older sequence.
        StoreUnavailable: the store does not answer; what the node has stays current.
        DataError: no variant runs on this machine, or the release is not what a release may be.
        CorruptDownload: bytes that do not match their digest.
        DiskFullError: not enough space.
    """
    with explain_os_errors(root):
        (root / "releases").mkdir(parents=True, exist_ok=True)
        (root / "staging").mkdir(exist_ok=True)
    with _locked(root), explain_os_errors(root):
        state = node.read_state(root)
        store = open_store(store_uri)
        wanted = _resolve(store, channel, state)
        release = read_verified(store, Release, release_key(wanted.release_digest), wanted.release_digest)
        digest, manifest = wanted.release_digest, _choose(store, release)
        fetched = 0
        if not _is_installed(root, digest, manifest):
            fetched = _install(store, root, digest, manifest)
        before = node.current_digest(root)
        state = State(
            sequences=state.sequences | {channel: wanted.sequence},
            releases=state.releases | {channel: digest},
            previous=before if before != digest else state.previous,
        )
        # Before the switch: a node that was killed in between must not accept anything older, either.
        node.write_state(root, state)
        if before != digest:
            node.switch(root, digest)
            log.info("now at release %s (%s), sequence %d", digest, manifest.variant, wanted.sequence)
        _collect_garbage(root, {digest, state.previous})
        return PullResult(digest, manifest.variant, node.release_path(root, digest), fetched, before != digest)


def _resolve(store: Store, channel: str, state: State) -> Channel:
    found = read_channel(store, channel)
    if found is None:
        raise StoreError(f"{store.uri}: nothing was published to channel {channel}; publish first, or check its name")
    accepted = state.sequences.get(channel, 0)
    if found.sequence < accepted:
        raise StoreError(
            f"{store.uri}: channel {channel} is at sequence {found.sequence}, but this node has accepted {accepted}; "
            "an old copy of the store was put back: publish again until its sequence is higher"
        )
    if found.sequence == accepted and found.release_digest != state.releases.get(channel):
        raise StoreError(
            f"{store.uri}: channel {channel} shows another release under sequence {accepted} than this node has "
            "accepted; the store was put back or tampered with: publish again"
        )
    return found


def _choose(store: Store, release: Release) -> Manifest:
    chosen = choose(store, release, this_machine())
    if isinstance(chosen, Manifest):
        return chosen
    raise DataError(
        "no variant of the release runs on this machine:\n  " + "\n  ".join(chosen) + "\npublish one that does"
    )


def _is_installed(root: Path, digest: str, manifest: Manifest) -> bool:
    """Whether the release is complete on disk. What is about to be switched to is hashed again, as it may have aged."""
    path = node.release_path(root, digest)
    if not path.is_dir():
        return False
    is_current = node.current_digest(root) == digest
    for file in manifest.files:
        found = path / file.path
        if not found.is_file() or found.is_symlink() or found.stat().st_size != file.size_bytes:
            return False
        if not is_current and file_digest(found) != file.sha256:
            return False
    try:
        return node.read_record(root, digest).manifest == manifest
    except ArtifactError:
        return False


def _install(store: Store, root: Path, digest: str, manifest: Manifest) -> int:
    """Fetch into staging, check, and rename into place."""
    staging = root / "staging" / manifest.digest
    for entry in (root / "staging").iterdir():
        if entry != staging:
            shutil.rmtree(entry)
    fetched = fetch_files(store, manifest, staging, _installed_files(root))
    record = Installed(release_digest=digest, manifest=manifest)
    write_atomically(node.record_path(root, digest), record.model_dump_json().encode())
    path = node.release_path(root, digest)
    shutil.rmtree(path, ignore_errors=True)
    sync_directory(staging)
    os.rename(staging, path)
    sync_directory(path.parent)
    return fetched


def _installed_files(root: Path) -> dict[str, Path]:
    """Files of installed releases by digest. They are verified when they are copied, like all else."""
    found = {}
    for record in (root / "releases").glob("*.json"):
        try:
            manifest = node.read_record(root, record.stem).manifest
        except ArtifactError:
            continue
        for file in manifest.files:
            path = node.release_path(root, record.stem) / file.path
            if path.is_file():
                found[file.sha256] = path
    return found


def _collect_garbage(root: Path, keep: set[str | None]) -> None:
    for entry in (root / "releases").iterdir():
        if entry.name.partition(".")[0] not in keep:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for entry in (root / "staging").iterdir():
        shutil.rmtree(entry)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    with open(root / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TransientError(f"another pull into {root} is running; try again when it has ended") from None
        yield
