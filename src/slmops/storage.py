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
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from slmops.errors import SlmopsError, StoreError, StoreUnavailable, explain_os_errors
from slmops.progress import Progress

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CHUNK_BYTES = 4 * 1024 * 1024
PROBE_KEY = "v1/probe"
NO_ETAG = '"0123456789abcdef0123456789abcdef"'
STALE_PARTIAL_S = 24 * 3600.0
MAX_CONFLICTS = 5


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
    def list(self, prefix: str) -> Iterator[str]:
        """Keys that begin with `prefix`, in order."""

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


def open_store(uri: str) -> Store:
    """The store at `s3://bucket/prefix` or in a local folder. S3's endpoint and keys come from the environment.

    Raises:
        StoreError: the URI is neither, or S3 has no credentials.
    """
    if uri.startswith("s3://"):
        parts = urlsplit(uri)
        if not parts.netloc or "@" in parts.netloc:
            raise StoreError("the store's URI has no plain bucket name; write s3://bucket or s3://bucket/prefix")
        return S3Store(parts.netloc, parts.path.strip("/"))
    if "://" in uri:
        scheme = uri.partition("://")[0]
        raise StoreError(f"a store is s3://bucket/prefix or a local folder, found {scheme}://; use one of the two")
    return LocalStore(Path(uri))


def fetch(uri: str, directory: Path) -> Path:
    """A local path for one file: `uri` itself if it is a path, else a copy of s3://bucket/key in `directory`."""
    if "://" not in uri:
        return Path(uri)
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket or not key or key.endswith("/"):
        raise StoreError(f"a file is s3://bucket/key or a local path, found {uri!r:.100}; use one of the two")
    path = directory / PurePosixPath(key).name
    download(uri, path)
    return path


def download(uri: str, path: Path) -> None:
    """Copy the single file at s3://bucket/key to `path`, whole or not at all."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    store = open_store(f"s3://{bucket}")
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
            raise StoreError(_too_large(self.uri, key, max_bytes))
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

    def list(self, prefix: str) -> Iterator[str]:
        for path in sorted(self.root.rglob("*")):
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix) and not key.startswith(".") and path.is_file():
                yield key

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
            raise StoreError(_missing(self.uri, key)) from None

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


class S3Store(Store):
    """A bucket of any S3-compatible server; boto3 reads endpoint, region and keys from the environment."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        config = Config(
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=16,
            retries={"mode": "standard", "total_max_attempts": 4},
        )
        try:
            session = boto3.Session(region_name=os.environ.get("AWS_REGION"))
            self._client: S3Client = session.client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise StoreError(f"{self.uri}: the S3 settings do not fit: {error}; check the AWS_... variables") from None

    def read(self, key: str, max_bytes: int) -> bytes:
        with self._explained(key):
            response = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key)
            if response["ContentLength"] > max_bytes:
                response["Body"].close()
                raise StoreError(_too_large(self.uri, key, max_bytes))
            return self._body(response, key)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        from botocore.exceptions import ClientError

        with self._explained(key):
            try:
                response = self._client.get_object(
                    Bucket=self.bucket, Key=self.prefix + key, Range=f"bytes={start}-{start + length - 1}"
                )
            except ClientError as error:
                if _status(error) == 416:
                    return b""
                raise
            if response["ContentLength"] > length:
                response["Body"].close()
                raise StoreError(f"{self.uri} ignores the Range header, found a whole object; use another S3 server")
            return self._body(response, key)

    def stat(self, key: str) -> Stat | None:
        from botocore.exceptions import ClientError

        with self._explained(key):
            try:
                found = self._client.head_object(Bucket=self.bucket, Key=self.prefix + key)
            except ClientError as error:
                if _status(error) != 404:
                    raise
                # HEAD has no body, so a missing bucket looks like a missing object: ask for the bucket, too.
                self._client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + key, MaxKeys=1)
                return None
            return Stat(found["ContentLength"], found["ETag"])

    def create(self, key: str, data: bytes | Path) -> bool:
        return self._put(key, data, {"IfNoneMatch": "*"})

    def replace(self, key: str, data: bytes, if_match: str | None) -> bool:
        if self._put(key, data, {"IfNoneMatch": "*"} if if_match is None else {"IfMatch": if_match}):
            return True
        # A request that was repeated because its first answer got lost meets its own object.
        found = self.stat(key)
        return found is not None and found.size_bytes == len(data) and self.read(key, len(data)) == data

    def list(self, prefix: str) -> Iterator[str]:
        with self._explained(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield entry["Key"].removeprefix(self.prefix)

    def _put(self, key: str, data: bytes | Path, condition: dict[str, str]) -> bool:
        from botocore.exceptions import ClientError

        conflicts = 0
        while True:
            with self._explained(key):
                try:
                    self._put_once(key, data, condition)
                    return True
                except ClientError as error:
                    # 412: the condition does not hold. 404: If-Match on an object that is gone.
                    # 409: another conditional write to the key was under way, and it is open which one will hold.
                    status, conflicts = _status(error), conflicts + 1
                    if status == 412 or (status == 404 and _code(error) == "NoSuchKey"):
                        return False
                    if status != 409 or conflicts == MAX_CONFLICTS:
                        raise
            time.sleep(0.2)

    def _put_once(self, key: str, data: bytes | Path, condition: dict[str, Any]) -> None:
        if isinstance(data, bytes):
            self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data, **condition)
            return
        with explain_os_errors(data), open(data, "rb") as body:
            self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=body, **condition)

    def _body(self, response: Any, key: str) -> bytes:
        data = bytes(response["Body"].read())
        if len(data) != response["ContentLength"]:
            raise StoreUnavailable(f"{self.uri}: the connection ended within {key}; try again")
        return data

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Turn boto3's errors into ours. Neither carries a secret: only names of settings and the store's own words."""
        from botocore import exceptions
        from urllib3.exceptions import HTTPError

        try:
            yield
        except SlmopsError:
            raise
        except exceptions.ClientError as error:
            self._explain(error, key)
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError):
            raise StoreError(
                f"{self.uri}: found no complete S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
        except exceptions.SSLError as error:
            raise StoreError(
                f"{self.uri}: the certificate of {self._client.meta.endpoint_url} is not trusted ({error}); "
                "set AWS_CA_BUNDLE to the file of its certificate authority"
            ) from None
        except (
            exceptions.ConnectionError,
            exceptions.HTTPClientError,
            exceptions.IncompleteReadError,
            HTTPError,
            ConnectionError,
        ) as error:
            raise StoreUnavailable(
                f"{self.uri} does not answer at {self._client.meta.endpoint_url} ({type(error).__name__}); check that "
                "it runs and that AWS_ENDPOINT_URL is right, then try again"
            ) from error
        except exceptions.BotoCoreError as error:
            raise StoreError(f"{self.uri}: {key}: {error}; check the store's URI and the AWS_... settings") from None

    def _explain(self, error: Any, key: str) -> NoReturn:
        code, status = _code(error), _status(error)
        if code == "NoSuchBucket":
            raise StoreError(f"{self.uri}: the bucket does not exist; create it, or correct the URI") from None
        if code in ("NoSuchKey", "404", "NotFound"):
            raise StoreError(_missing(self.uri, key)) from None
        if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
            raise StoreError(
                f"{self.uri} refuses these credentials for {key} ({code}); check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and what they may do in this bucket"
            ) from None
        if status >= 500 or status in (408, 409, 429) or code in ("SlowDown", "RequestTimeout", "Throttling"):
            raise StoreUnavailable(f"{self.uri} cannot serve {key} now ({status} {code}); try again later") from error
        raise StoreError(f"{self.uri} refuses the request for {key} ({status} {code}); check URI and region") from error


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


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _missing(uri: str, key: str) -> str:
    return f"{uri} has no object {key}; check the URI, or publish again"


def _too_large(uri: str, key: str, max_bytes: int) -> str:
    return f"{uri}: {key} is larger than {max_bytes:,} bytes, which no such object may be; check who writes there"
