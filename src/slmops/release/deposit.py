"""Put a release into a store: blobs, manifests, release; what others point to goes last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slmops.errors import StoreError
from slmops.progress import Progress
from slmops.release.format import Manifest, Release, ReleaseFile, blob_key, manifest_key, release_key
from slmops.storage import Store

NUM_UPLOADS = 4
"""Files on their way at once."""


def deposit(
    store: Store, release: Release, manifests: Sequence[Manifest], path_of: Callable[[ReleaseFile], Path]
) -> int:
    """Create what is missing, then check that all is there; return the bytes that were new.

    `path_of` gives a local copy of a file; it is asked only for files that the store does not have, from several
    threads. Killed at any point, this leaves nothing that a reader sees, and the next run goes on.

    Raises:
        StoreError: an object of the release has another size than it must have.
    """
    blobs = {file.sha256: file for manifest in manifests for file in manifest.files}
    blobs |= {file.sha256: file for file in release.evidence}
    objects = {manifest_key(manifest.digest): manifest.to_bytes() for manifest in manifests}
    objects[release_key(release.digest)] = release.to_bytes()

    def upload(file: ReleaseFile) -> int:
        # Looking first saves sending the bytes of what is there; `create` alone decides.
        key = blob_key(file.sha256)
        is_new = store.stat(key) is None and store.create(key, path_of(file))
        progress.advance(file.size_bytes)
        return file.size_bytes if is_new else 0

    with (
        Progress("publish", sum(file.size_bytes for file in blobs.values()), "bytes") as progress,
        ThreadPoolExecutor(NUM_UPLOADS) as pool,
    ):
        num_new = sum(pool.map(upload, [blobs[digest] for digest in sorted(blobs)]))
    for key, data in objects.items():
        num_new += len(data) if store.create(key, data) else 0
    _check(
        store,
        {blob_key(file.sha256): file.size_bytes for file in blobs.values()}
        | {key: len(data) for key, data in objects.items()},
    )
    return num_new


def _check(store: Store, expected: dict[str, int]) -> None:
    """Everything is in the store with its size, or no channel must move."""
    for key, size_bytes in expected.items():
        found = store.stat(key)
        if found is None or found.size_bytes != size_bytes:
            state = "is missing" if found is None else f"has {found.size_bytes:,} bytes"
            raise StoreError(
                f"{store.uri}: {key} {state}, it must have {size_bytes:,} bytes; remove that object and publish again"
            )
