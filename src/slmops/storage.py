"""One small interface over a local folder and an S3 bucket, with the guarantees that publishing needs.

`create` never overwrites and `replace` is a compare-and-swap, also between machines. On S3 both rest on conditional
requests (`If-None-Match`, `If-Match`); `Store.probe` refuses a store that ignores them.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from slmops.errors import StoreError, StoreUnavailable, explain_os_errors
from slmops.progress import Progress

CHUNK_BYTES = 4 * 1024 * 1024
PROBE_KEY = "v1/probe"
NO_ETAG = '"0123456789abcdef0123456789abcdef"'
STALE_PARTIAL_S = 24 * 3600.0


@dataclass(frozen=True)
class Stat:
    """What a store knows about an object without reading it."""

    size_bytes: int
    etag: str
    """Changes whenever the object's content is replaced."""


class Store(ABC):
    """Objects by key below one URI. Keys are relative POSIX paths. All methods may be called from several threads.

    All methods raise StoreError if the store refuses, StoreUnavailable if it does not answer, DiskFullError if it is a
    folder on a full disk.
    """

    uri: str

    @abstractmethod
    def read(self, key: str, max_bytes: int) -> bytes:
        """The whole object; StoreError if there is none or it is larger than `max_bytes`."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer where the object ends before. StoreError if there is none."""

    @abstractmethod
    def stat(self, key: str) -> Stat | None:
        """Size and etag, or None if there is no such object."""

    @abstractmethod
    def create(self, key: str, data: bytes | Path) -> bool:
        """Write a new object, whole or not at all; False, and nothing changes, if it exists already."""

    @abstractmethod
    def replace(self, key: str, data: bytes, if_match: str | None) -> bool:
        """Write the object if its etag still is `if_match` (None: if there is none); else False, nothing changes."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; nothing happens if there is none."""

    @abstractmethod
    def entries(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        """Keys that begin with `prefix`, in order, each with what `stat` says of it."""

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with `prefix`, in order."""
        return (key for key, _ in self.entries(prefix))

    def probe(self) -> None:
        """Check that conditional writes are kept, with one small object that stays in the store.

        Raises:
            StoreError: they are ignored, so two publishers could overwrite each other.
        """
        data = b"slmops asks whether this store keeps If-None-Match and If-Match\n"
        self.create(PROBE_KEY, data)
        if self.create(PROBE_KEY, data) or self.replace(PROBE_KEY, data + b"again\n", if_match=NO_ETAG):
            raise StoreError(
                f"{self.uri} ignores conditional writes (If-None-Match, If-Match), so publishers could overwrite each "
                "other; use a store that keeps them, such as AWS S3, MinIO, Ceph or SeaweedFS"
            )

    def _missing(self, key: str) -> StoreError:
        return StoreError(f"{self.uri} has no object {key}; check the URI, or publish again")

    def _too_large(self, key: str, max_bytes: int) -> StoreError:
        return StoreError(
            f"{self.uri}: {key} is larger than {max_bytes:,} bytes, which no such object may be; check who writes there"
        )


def open_store(uri: str, profile: str | None = None) -> Store:
    """The store at `s3://bucket/prefix` or in a local folder.

    S3's endpoint and keys come from the environment, or from `profile` of the files that AWS_CONFIG_FILE and
    AWS_SHARED_CREDENTIALS_FILE name.

    Raises:
        StoreError: the URI is neither, or S3 has no credentials.
    """
    if uri.startswith("s3://"):
        parts = urlsplit(uri)
        if not parts.netloc or "@" in parts.netloc:
            raise StoreError("the store's URI has no plain bucket name; write s3://bucket or s3://bucket/prefix")
        from slmops.s3 import S3Store  # loads boto3, which takes a while

        return S3Store(parts.netloc, parts.path.strip("/"), profile)
    if "://" in uri:
        scheme = uri.partition("://")[0]
        raise StoreError(f"a store is s3://bucket/prefix or a local folder, found {scheme}://; use one of the two")
    return LocalStore(Path(uri))


def fetch(uri: str, directory: Path) -> Path:
    """A local path for one file: `uri` itself if it is a path, else a copy of s3://bucket/key in `directory`."""
    if "://" not in uri:
        return Path(uri)
    path = directory / PurePosixPath(bucket_and_key(uri)[1]).name
    download(uri, path)
    return path


def fetch_directory(uri: str, directory: Path) -> Path:
    """A local path for all files below a prefix: `uri` itself if it is a path, else a copy of it in `directory`.

    Raises:
        StoreError: there is nothing below it, or a name leads out of it.
    """
    if "://" not in uri:
        return Path(uri)
    uri = uri.rstrip("/")
    keys = list(open_store(uri).list(""))
    if not keys:
        raise StoreError(f"{uri} holds no files; check bucket and prefix")
    for key in keys:
        path = directory / key
        if not path.resolve().is_relative_to(directory.resolve()):
            raise StoreError(f"{uri} holds {key!r}, which leads out of it; rename it")
        path.parent.mkdir(parents=True, exist_ok=True)
        download(f"{uri}/{key}", path)
    return directory


def bucket_and_key(uri: str) -> tuple[str, str]:
    """The two parts of s3://bucket/key.

    Raises:
        StoreError: it is no such URI.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket or not key or key.endswith("/"):
        raise StoreError(f"a file is s3://bucket/key or a local path, found {uri!r:.100}; use one of the two")
    return bucket, key


def download(uri: str, path: Path) -> None:
    """Copy the single file at s3://bucket/key to `path`, whole or not at all."""
    bucket, key = bucket_and_key(uri)
    fetch_object(open_store(f"s3://{bucket}"), key, path)


def fetch_object(store: Store, key: str, path: Path) -> None:
    """Copy one object to `path`, whole or not at all.

    Raises:
        StoreError: there is no such object.
        StoreUnavailable: it changed while it was read.
    """
    uri = f"{store.uri}/{key}"
    found = store.stat(key)
    if found is None:
        raise StoreError(f"{uri} does not exist; check bucket and key")
    partial = path.with_name(path.name + ".partial")
    try:
        with (
            explain_os_errors(partial),
            open(partial, "wb") as file,
            Progress(f"download {path.name}", found.size_bytes, "bytes") as progress,
        ):
            for start in range(0, found.size_bytes, CHUNK_BYTES):
                length = min(CHUNK_BYTES, found.size_bytes - start)
                data = store.read_range(key, start, length)
                if len(data) != length:
                    raise StoreUnavailable(f"{uri} became shorter while it was read; run the same command again")
                file.write(data)
                progress.advance(length)
        if store.stat(key) != found:
            raise StoreUnavailable(f"{uri} was replaced while it was read; run the same command again")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class LocalStore(Store):
    """A folder. Writes are atomic (a finished, synced file is renamed); a lock file serializes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def read(self, key: str, max_bytes: int) -> bytes:
        with explain_os_errors(self.root), self._open(key) as file:
            data = bytes(file.read(max_bytes + 1))
        if len(data) > max_bytes:
            raise self._too_large(key, max_bytes)
        return data

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with explain_os_errors(self.root), self._open(key) as file:
            file.seek(start)
            return bytes(file.read(length))

    def stat(self, key: str) -> Stat | None:
        try:
            found = self._path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Stat(found.st_size, f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}")

    def create(self, key: str, data: bytes | Path) -> bool:
        return self._write(key, data, if_match=None)

    def replace(self, key: str, data: bytes, if_match: str | None) -> bool:
        return self._write(key, data, if_match)

    def delete(self, key: str) -> None:
        with explain_os_errors(self.root):
            self._path(key).unlink(missing_ok=True)

    def entries(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        for path in sorted(self.root.rglob("*")):
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix) and not key.startswith(".") and path.is_file() and (found := self.stat(key)):
                yield key, found

    def probe(self) -> None:
        super().probe()
        for partial in (self.root / ".partial").iterdir():
            if time.time() - partial.stat().st_mtime > STALE_PARTIAL_S:
                partial.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        if not key or key.startswith((".", "/")) or ".." in key.split("/"):
            raise StoreError(f"{key!r:.100} is no key of a store; use a relative path without dots in front")
        return self.root / key

    def _open(self, key: str) -> Any:
        try:
            return open(self._path(key), "rb")
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(key) from None

    def _write(self, key: str, data: bytes | Path, if_match: str | None) -> bool:
        target = self._path(key)
        partial = self.root / ".partial" / secrets.token_hex(8)
        with explain_os_errors(partial):
            partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_synced(partial, data)
                with self._locked():
                    found = self.stat(key)
                    if (found.etag if found else None) != if_match:
                        return False
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(partial, target)
                    sync_directory(target.parent)
                    return True
            finally:
                partial.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.root / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def sync_directory(path: Path) -> None:
    """Make renames in `path` outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at `path`, whole or not at all, so that it outlasts a power cut."""
    partial = path.with_name(f"{path.name}.partial")
    with explain_os_errors(path):
        _write_synced(partial, data)
        os.replace(partial, path)
        sync_directory(path.parent)


def _write_synced(path: Path, data: bytes | Path) -> None:
    with open(path, "wb") as file:
        if isinstance(data, Path):
            with open(data, "rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    file.write(chunk)
        else:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
