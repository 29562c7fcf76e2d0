"""One repository of an OCI registry over HTTP (github.com/opencontainers/distribution-spec, spec.md).

The `oras` package logs in: with what `docker login` has left in Docker's config ($DOCKER_CONFIG or ~/.docker), its
credential helpers, or $ORAS_USER and $ORAS_PASS. Requests are made here, because oras reads a whole blob into memory,
waits forever for an answer, checks no digest, and sends what it logged in with to any host that a registry names.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from slmops.errors import CorruptDownload, StoreError, StoreUnavailable, explain_full_disk

if TYPE_CHECKING:
    import requests

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
"""What the specification asks registries to take."""
MAX_ERROR_BYTES = 16 * 1024
CHUNK_BYTES = 1024 * 1024
TIMEOUT_S = (10.0, 120.0)
"""To connect, and between two pieces of an answer."""

_TARGET = re.compile(
    r"(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?P<port>:[0-9]{1,5})?"
    r"/(?P<repository>[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class Target:
    """Where an artifact lies: HOST[:PORT]/REPOSITORY with :TAG, @sha256:DIGEST or both behind it."""

    text: str
    host: str
    """With the port, if there is one."""
    repository: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Target:
        """
        Raises:
            StoreError: it is no such name.
        """
        found = _TARGET.fullmatch(text)
        # As docker has it: a first part without dot or port is no host, but an account of a hub that nobody named.
        is_host = found and (found["port"] or re.search(r"[.\[]", found["host"]) or found["host"] == "localhost")
        if not found or not is_host or len(text) > 512 or not (found["tag"] or found["digest"]):
            raise StoreError(
                f"an artifact is HOST/REPOSITORY:TAG or HOST/REPOSITORY@sha256:DIGEST, found {text!r:.200}; give it "
                "so, with the registry's host and lower-case names"
            )
        return cls(text, found["host"] + (found["port"] or ""), found["repository"], found["tag"], found["digest"])


def _is_loopback(netloc: str) -> bool:
    host = urlsplit(f"//{netloc}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Registry:
    """The repository of `target`. Plain HTTP is spoken to this machine alone, or where `insecure` asks for it.

    All methods raise StoreError if the registry refuses, StoreUnavailable if it does not answer.
    """

    def __init__(self, target: Target, *, insecure: bool = False) -> None:
        import requests

        self.target = target
        self.insecure = insecure
        self.root = f"{'http' if insecure or _is_loopback(target.host) else 'https'}://{target.host}"
        self.base = f"{self.root}/v2/{target.repository}"
        self.session = requests.Session()
        self.session.auth = lambda request: request  # else requests puts what .netrc has in place of our own
        self.session.hooks["response"].append(self._check_redirect)
        self.authorization: str | None = None

    def has_blob(self, digest: str) -> bool:
        with self._request("HEAD", f"{self.base}/blobs/{digest}", accepted=(200, 404)) as response:
            return bool(response.status_code == 200)

    def upload_blob(self, data: bytes | Path, digest: str, size_bytes: int) -> None:
        """Write a blob, unless it is there already. The registry checks the digest."""
        if self.has_blob(digest):
            return
        with self._request("POST", f"{self.base}/blobs/uploads/", accepted=(202,)) as response:
            location = urljoin(response.url, response.headers.get("Location", ""))
        url = f"{location}{'&' if urlsplit(location).query else '?'}digest={digest}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size_bytes)}
        with self._request("PUT", url, accepted=(201,), data=data, headers=headers):
            pass

    def put_manifest(self, data: bytes, media_type: str) -> None:
        """Write the manifest under the target's tag."""
        url, headers = f"{self.base}/manifests/{self.target.tag}", {"Content-Type": media_type}
        with self._request("PUT", url, accepted=(201,), data=data, headers=headers):
            pass

    def read_manifest(self) -> tuple[bytes, str]:
        """The manifest that the target names, and its digest, which is checked where the target gives one.

        Raises:
            CorruptDownload: it is not what its digest says.
            StoreError: there is none, or it is larger than 4 MiB.
        """
        reference = self.target.digest or self.target.tag
        url, headers = f"{self.base}/manifests/{reference}", {"Accept": MANIFEST_TYPE}
        with self._request("GET", url, accepted=(200,), headers=headers) as response:
            data = b"".join(self._stream(response, MAX_MANIFEST_BYTES))
            stated = response.headers.get("Docker-Content-Digest")
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        for expected in (self.target.digest, stated):
            if expected and expected.startswith("sha256:") and expected != digest:
                raise CorruptDownload(
                    f"{self.target.text}: the manifest has the digest {digest}, not {expected}; try again"
                )
        return data, digest

    def read_blob(self, digest: str, size_bytes: int) -> bytes:
        """A small blob, checked.

        Raises:
            CorruptDownload: it is not what its digest says.
        """
        return b"".join(self._blob(digest, size_bytes))

    def download_blob(self, digest: str, size_bytes: int, path: Path) -> None:
        """Write a blob to `path`, which does not exist yet; what is there after an error is not complete.

        Raises:
            CorruptDownload: it is not what its digest says.
            DiskFullError: the device is full.
        """
        with explain_full_disk(path), open(path, "xb") as file:
            for chunk in self._blob(digest, size_bytes):
                file.write(chunk)

    def _blob(self, digest: str, size_bytes: int) -> Iterator[bytes]:
        whole, size = hashlib.sha256(), 0
        with self._request("GET", f"{self.base}/blobs/{digest}", accepted=(200,)) as response:
            for chunk in self._stream(response):
                size += len(chunk)
                if size > size_bytes:
                    break
                whole.update(chunk)
                yield chunk
        if size != size_bytes or f"sha256:{whole.hexdigest()}" != digest:
            raise CorruptDownload(
                f"{self.target.text}: blob {digest} is damaged (its bytes are others, or not {size_bytes:,}); try "
                "again, or push the artifact again"
            )

    def _stream(self, response: requests.Response, max_bytes: int | None = None) -> Iterator[bytes]:
        size = 0
        with self._explain():
            for chunk in response.iter_content(CHUNK_BYTES):
                size += len(chunk)
                if max_bytes is not None and size > max_bytes:
                    raise StoreError(
                        f"{self.target.text}: {response.url} has more than {max_bytes:,} bytes; it is refused"
                    )
                yield chunk

    @contextmanager
    def _request(
        self,
        method: str,
        url: str,
        *,
        accepted: tuple[int, ...],
        data: bytes | Path | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[requests.Response]:
        """An answer with one of the `accepted` codes. Where the registry wants a login, it is made, once."""
        response = self._send(method, url, data, headers or {})
        if response.status_code == 401 and self._is_own(url) and self._log_in(response):
            response.close()
            response = self._send(method, url, data, headers or {})
        with response:
            if response.status_code not in accepted:
                self._refuse(response)
            yield response

    def _send(self, method: str, url: str, data: bytes | Path | None, headers: dict[str, str]) -> requests.Response:
        self._check_address(url)
        if self.authorization and self._is_own(url):
            headers = headers | {"Authorization": self.authorization}
        with self._explain():
            if isinstance(data, Path):
                with open(data, "rb") as file:
                    return self.session.request(method, url, data=file, headers=headers, timeout=TIMEOUT_S, stream=True)
            return self.session.request(method, url, data=data, headers=headers, timeout=TIMEOUT_S, stream=True)

    def _check_address(self, url: str) -> None:
        parts = urlsplit(url)
        plain = parts.scheme == "http" and (self.insecure or _is_loopback(parts.netloc))
        if parts.scheme != "https" and not plain:
            raise StoreError(f"{self.target.text}: the registry names {url!r:.200}, which is not https; it is refused")

    def _check_redirect(self, response: requests.Response, **_: Any) -> None:
        if response.is_redirect:
            self._check_address(urljoin(response.url, response.headers["Location"]))

    def _is_own(self, url: str) -> bool:
        """Whether a URL is of the registry itself: what logs in there is sent nowhere else."""
        return url.startswith(f"{self.root}/")

    def _log_in(self, response: requests.Response) -> bool:
        """Set the header that the registry asked for; False if there is nothing to log in with, or it was refused."""
        import oras.auth  # type: ignore[import-untyped]
        import oras.auth.utils  # type: ignore[import-untyped]
        import oras.container  # type: ignore[import-untyped]

        challenge = response.headers.get("WWW-Authenticate", "")
        is_basic = challenge.lower().startswith("basic")
        realm = oras.auth.utils.parse_auth_header(challenge).realm or ""
        if not is_basic:
            self._check_address(realm)
        with self._explain(), _quiet_oras():
            backend: Any = oras.auth.get_auth_backend(
                "basic" if is_basic else "token", session=_Impatient(self.session)
            )
            user, password = os.environ.get("ORAS_USER"), os.environ.get("ORAS_PASS")
            if user and password:
                backend.set_basic_auth(user, password)
            try:
                if folder := os.environ.get("DOCKER_CONFIG"):  # which oras does not know
                    backend._auth_config = _read_docker_config(Path(folder) / "config.json")
                backend.load_configs(oras.container.Container(f"{self.target.host}/{self.target.repository}"))
            except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
                raise StoreError(
                    f"Docker's config or its credential helper cannot be read: {error!r}; log in again"
                ) from None
            if is_basic and getattr(backend, "_basic_auth", None) is None:
                return False
            headers, changed = backend.authenticate_request(response, {}, refresh=True)
        self.authorization = headers.get("Authorization")
        return bool(changed)

    def _refuse(self, response: requests.Response) -> None:
        """
        Raises:
            StoreError, StoreUnavailable: always.
        """
        code, said = response.status_code, self._said(response)
        where = f"{self.target.text}: the registry answered {code}{said}"
        if code in (401, 403):
            raise StoreError(
                f"{where}; run `docker login {self.target.host}`, or set ORAS_USER and ORAS_PASS, as someone who may"
            )
        if code == 404:
            raise StoreError(f"{where}; check host, repository and tag")
        if code == 429 or code >= 500:
            raise StoreUnavailable(f"{where}; try again")
        raise StoreError(f"{where}; it does not take this artifact")

    def _said(self, response: requests.Response) -> str:
        """The registry's own words, in one short line."""
        try:
            errors = json.loads(next(iter(response.iter_content(MAX_ERROR_BYTES)), b""))["errors"]
            return f" ({errors[0].get('message') or errors[0]['code']})"[:300].replace("\n", " ")
        except (ValueError, LookupError, TypeError, AttributeError, OSError):
            return ""

    @contextmanager
    def _explain(self) -> Iterator[None]:
        import requests

        try:
            yield
        except requests.exceptions.SSLError as error:
            raise StoreError(
                f"{self.target.text}: no TLS with the registry ({error}); put the file of its certificate's authority "
                "into $REQUESTS_CA_BUNDLE, or ask for plain HTTP, if that is all it speaks"
            ) from None
        except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
            raise StoreError(f"{self.target.text}: the registry names an address that is none ({error})") from None
        except requests.exceptions.RequestException as error:
            raise StoreUnavailable(f"{self.target.text}: the registry does not answer ({error}); try again") from None


def _read_docker_config(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_bytes()) if path.exists() else {}
    return {
        "auths": found.get("auths", {}),
        "credsStore": found.get("credsStore"),
        "credHelpers": found.get("credHelpers", {}),
    }


class _Impatient:
    """A session for oras, which asks for tokens without a time limit."""

    def __init__(self, session: requests.Session) -> None:
        self.session = session

    def request(self, method: str, url: str, **options: Any) -> requests.Response:
        return self.session.request(method, url, timeout=TIMEOUT_S, **options)

    def get(self, url: str, **options: Any) -> requests.Response:
        return self.request("GET", url, **options)


@contextmanager
def _quiet_oras() -> Iterator[None]:
    """Keep oras from writing to the screen what our own error says."""
    import oras.logger  # type: ignore[import-untyped]

    logger = oras.logger.logger.logger
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
