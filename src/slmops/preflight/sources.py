"""What the pipeline reads and writes elsewhere: the data, the release store, a teacher's endpoint."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import urllib3

from slmops import hub
from slmops.config import TEACHER_API_KEY
from slmops.errors import DataError, StoreError, TransientError, UserError, explain_os_errors
from slmops.preflight.findings import Findings
from slmops.storage import bucket_and_key, open_store

ENDPOINT_TIMEOUT_S = 10.0


def check_data(uri: str) -> Findings:
    """The data exist, have bytes and can be read; `data_version` changes with their content.

    Of a repository on a hub, the commit is the version, and nobody says how many bytes there are.
    """
    found = Findings()
    with found.about("data"):
        size_bytes, *version = _data(uri)
        if size_bytes == 0:
            raise DataError(f"{uri} is empty; check that it is the right file")
        digest = hashlib.sha256(json.dumps([size_bytes, *version]).encode()).hexdigest()
        found.facts |= {"data_version": digest} | ({} if size_bytes is None else {"data_bytes": size_bytes})
    return found


def check_store(uri: str) -> Findings:
    """Releases can be written, and the store honours conditional writes."""
    found = Findings()
    with found.about("store"):
        open_store(uri).probe()
        found.facts["store"] = uri
    return found


def check_endpoint(url: str) -> Findings:
    """An OpenAI-compatible server lists its models."""
    found = Findings()
    with found.about("teacher endpoint"):
        key = os.environ.get(TEACHER_API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            # No redirects: the key is for this server only.
            answer = urllib3.PoolManager(retries=False, timeout=ENDPOINT_TIMEOUT_S).request(
                "GET", f"{url.rstrip('/')}/models", headers=headers, redirect=False
            )
        except urllib3.exceptions.HTTPError as error:
            raise TransientError(f"{url} does not answer ({type(error).__name__}); check URL and network") from None
        found.facts["teacher_models"] = _model_names(url, answer.status, answer.data)
    return found


def _data(uri: str) -> tuple[object, ...]:
    """Size in bytes, None if unknown, and what else changes with the content."""
    if uri.startswith(hub.SCHEME):
        return None, hub.commit_of(uri)
    if "://" in uri:
        return _object(uri)
    return _folder(Path(uri)) if Path(uri).is_dir() else _local_file(Path(uri))


def _local_file(path: Path) -> tuple[int, int]:
    with explain_os_errors(path):
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is neither file nor folder; give one of them")
        with open(path, "rb") as file:
            file.read(1)
        found = path.stat()
    return found.st_size, found.st_mtime_ns


def _folder(path: Path) -> tuple[int, list[object]]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    found = [(file.relative_to(path).as_posix(), *_local_file(file)) for file in files]
    return sum(size for _, size, _ in found), list(found)


def _object(uri: str) -> tuple[int, str]:
    bucket, key = bucket_and_key(uri)
    store = open_store(f"s3://{bucket}")
    found = store.stat(key)
    if found is None:
        raise StoreError(f"{uri} does not exist; check bucket and key")
    store.read_range(key, 0, 1)
    return found.size_bytes, found.etag


def _model_names(url: str, status: int, body: bytes) -> list[str]:
    if status in (401, 403):
        raise UserError(f"{url} answered {status}; put a valid key into ${TEACHER_API_KEY}")
    if status == 429 or status >= 500:
        raise TransientError(f"{url} answered {status}; try again later")
    try:
        if status == 200:
            return [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{url}/models answered {status} with no list of models; is it the base URL of an OpenAI-compatible server, "
        "such as http://teacher:8000/v1?"
    )
