"""Fetch the files of a variant in ranges, each verified before it counts, resumable after a `kill -9`."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from slmops.errors import CorruptDownload, DiskFullError, StoreUnavailable, explain_os_errors
from slmops.progress import Progress, log
from slmops.release.format import (
    GENAI_CONFIG,
    MAX_GENAI_CONFIG_BYTES,
    Manifest,
    ReleaseFile,
    blob_key,
    refuse_native_code,
)
from slmops.storage import Store

NUM_IN_FLIGHT = 4
"""Ranges on their way at once; each takes about RANGE_BYTES of memory."""
NUM_ATTEMPTS = 3
"""How often a range that does not match its digest is fetched."""
MARGIN_BYTES = 16 * 1024 * 1024
"""Left free beside the release, for the node's own files."""


def fetch_files(store: Store, manifest: Manifest, staging: Path, installed: dict[str, Path]) -> int:
    """Make `staging` hold the manifest's files, verified and synced; return the bytes that came from the store.

    Ranges that an earlier run left in `staging` are verified from disk and not fetched again. A file whose digest is
    in `installed` (digest to path) is copied from there: a tokenizer seldom changes between releases.

    Raises:
        CorruptDownload: a range does not match its digest, however often it is fetched.
        DataError: the model's settings name native code.
        DiskFullError: there is not enough space; found before anything is fetched, where that can be.
    """
    with explain_os_errors(staging):
        staging.mkdir(parents=True, exist_ok=True)
        wanted = {file.path for file in manifest.files}
        for entry in staging.iterdir():
            if entry.name not in wanted or entry.is_symlink() or not entry.is_file():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        _reserve(manifest, staging)
        fetched = 0
        with Progress("fetch", manifest.size_bytes, "bytes") as progress:
            for file in manifest.files:
                fetched += _fetch_file(store, file, staging / file.path, installed.get(file.sha256), progress)
        with open(staging / GENAI_CONFIG, "rb") as config:
            settings = config.read(MAX_GENAI_CONFIG_BYTES + 1)
        refuse_native_code(settings, f"{store.uri}: {GENAI_CONFIG} of variant {manifest.variant}")
        return fetched


def _reserve(manifest: Manifest, staging: Path) -> None:
    present = sum(entry.stat().st_blocks * 512 for entry in staging.iterdir())
    needed = max(0, manifest.size_bytes - present) + MARGIN_BYTES
    free = shutil.disk_usage(staging).free
    if free < needed:
        raise DiskFullError(
            f"{staging} needs {needed:,} bytes for this release, {free:,} are free; free some space and run the same "
            "command again"
        )


def _fetch_file(store: Store, file: ReleaseFile, path: Path, twin: Path | None, progress: Progress) -> int:
    if twin is not None and not path.exists():
        shutil.copyfile(twin, path)
    with _opened(path, file.size_bytes) as descriptor:
        missing = []
        for index in range(len(file.ranges)):
            start, length = file.range_at(index)
            if _digest(os.pread(descriptor, length, start)) == file.ranges[index]:
                progress.advance(length)
            else:
                missing.append(index)
        with ThreadPoolExecutor(NUM_IN_FLIGHT) as pool:
            tasks = [pool.submit(_fetch_range, store, file, index, descriptor) for index in missing]
            try:
                for task in as_completed(tasks):
                    progress.advance(task.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        os.fsync(descriptor)
    with open(path, "rb") as whole:
        if hashlib.file_digest(whole, "sha256").hexdigest() != file.sha256:
            # Its ranges all match, so the manifest contradicts itself, and fetching again would not help.
            raise CorruptDownload(f"{path} does not match the digest of the whole file; publish the release again")
    return sum(file.range_at(index)[1] for index in missing)


@contextmanager
def _opened(path: Path, size_bytes: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        if os.fstat(descriptor).st_size > size_bytes:
            os.ftruncate(descriptor, size_bytes)
        yield descriptor
    finally:
        os.close(descriptor)


def _fetch_range(store: Store, file: ReleaseFile, index: int, descriptor: int) -> int:
    start, length = file.range_at(index)
    key = blob_key(file.sha256)
    for attempt in range(1, NUM_ATTEMPTS + 1):
        try:
            data = store.read_range(key, start, length)
        except StoreUnavailable:
            if attempt == NUM_ATTEMPTS:
                raise
            problem = "the store did not answer"
        else:
            if _digest(data) == file.ranges[index]:
                _write(descriptor, data, start)
                return length
            problem = f"they do not match their digest ({len(data):,} bytes found)"
        log.info("%s, %d bytes from %d: %s; attempt %d", file.path, length, start, problem, attempt)
        time.sleep(0.1 * 2**attempt)
    raise CorruptDownload(
        f"{store.uri}: {key} (file {file.path}), {length:,} bytes from {start:,}: {problem}, {NUM_ATTEMPTS} times; "
        "remove that object from the store and publish again"
    )


def _write(descriptor: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
