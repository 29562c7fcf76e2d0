"""The S3 side of `slmops.storage`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import boto3
from botocore import exceptions
from botocore.config import Config
from urllib3.exceptions import HTTPError

from slmops.errors import SlmopsError, StoreError, StoreUnavailable, explain_os_errors
from slmops.storage import Stat, Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_CONFLICTS = 5


class S3Store(Store):
    """A bucket of any S3-compatible server; boto3 reads endpoint, region and keys from the environment."""

    def __init__(self, bucket: str, prefix: str = "", profile: str | None = None) -> None:
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
            session = boto3.Session(region_name=os.environ.get("AWS_REGION"), profile_name=profile)
            self._client: S3Client = session.client("s3", config=config)
        except (exceptions.BotoCoreError, ValueError) as error:
            raise StoreError(f"{self.uri}: the S3 settings do not fit: {error}; check the AWS_... variables") from None

    def read(self, key: str, max_bytes: int) -> bytes:
        with self._explained(key):
            response = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key)
            if response["ContentLength"] > max_bytes:
                response["Body"].close()
                raise self._too_large(key, max_bytes)
            return self._body(response, key)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._explained(key):
            try:
                response = self._client.get_object(
                    Bucket=self.bucket, Key=self.prefix + key, Range=f"bytes={start}-{start + length - 1}"
                )
            except exceptions.ClientError as error:
                if _status(error) == 416:
                    return b""
                raise
            if response["ContentLength"] > length:
                response["Body"].close()
                raise StoreError(f"{self.uri} ignores the Range header, found a whole object; use another S3 server")
            return self._body(response, key)

    def stat(self, key: str) -> Stat | None:
        with self._explained(key):
            try:
                found = self._client.head_object(Bucket=self.bucket, Key=self.prefix + key)
            except exceptions.ClientError as error:
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

    def delete(self, key: str) -> None:
        with self._explained(key):
            self._client.delete_object(Bucket=self.bucket, Key=self.prefix + key)

    def entries(self, prefix: str) -> Iterator[tuple[str, Stat]]:
        with self._explained(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self.prefix + prefix
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield entry["Key"].removeprefix(self.prefix), Stat(entry["Size"], entry["ETag"])

    def _put(self, key: str, data: bytes | Path, condition: dict[str, str]) -> bool:
        conflicts = 0
        while True:
            with self._explained(key):
                try:
                    self._put_once(key, data, condition)
                    return True
                except exceptions.ClientError as error:
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
            raise self._missing(key) from None
        if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
            raise StoreError(
                f"{self.uri} refuses these credentials for {key} ({code}); check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and what they may do in this bucket"
            ) from None
        if status >= 500 or status in (408, 409, 429) or code in ("SlowDown", "RequestTimeout", "Throttling"):
            raise StoreUnavailable(f"{self.uri} cannot serve {key} now ({status} {code}); try again later") from error
        raise StoreError(f"{self.uri} refuses the request for {key} ({status} {code}); check URI and region") from error


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
