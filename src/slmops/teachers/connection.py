"""The way to an endpoint: its key, a proxy, and requests that end with a whole response or a reason why not."""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit, urlunsplit

import aiohttp

from slmops import __version__
from slmops.config import TEACHER_API_KEY, TEACHER_API_KEY_FILE
from slmops.errors import ConfigError, UserError, explain_os_errors
from slmops.teachers.openai_api import Unusable

CONNECT_TIMEOUT_S = 15.0
KEEPALIVE_S = 4.0
"""uvicorn, which is under most servers of this kind, hangs up after five idle seconds."""
MAX_RETRY_AFTER_S = 120.0
MAX_KEY_BYTES = 8192


class Connection:
    """Requests to one endpoint. The key goes there and nowhere else, as no redirect is followed."""

    def __init__(self, url: str, key: str | None, *, timeout_s: float, max_bytes: int, where: str) -> None:
        """
        Args:
            url: Base address.
            key: Sent with each request.
            timeout_s: Of one request, from its start to the last byte of its response.
            max_bytes: Longest response that is read.
            where: What error messages call the endpoint.
        """
        self._url, self._timeout_s, self._max_bytes, self._where = url, timeout_s, max_bytes, where
        self._proxy = _proxy(url)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        headers["User-Agent"] = f"slmops/{__version__}"
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, method: str, path: str, body: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
        """One request; returns status, headers and body of the response.

        Raises:
            Unusable: there is no whole response.
            UserError: the host cannot be spoken to.
        """
        base, _, query = self._url.partition("?")
        url = f"{base.rstrip('/')}/{path}" + (f"?{query}" if query else "")
        try:
            async with self._session.request(method, url, data=body, allow_redirects=False, **self._proxy) as response:
                return response.status, response.headers, await _read(response, self._max_bytes)
        except aiohttp.ConnectionTimeoutError:
            raise Unusable("no_connection", f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        except TimeoutError:
            raise Unusable("timeout", f"no answer within {self._timeout_s:g} s") from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise UserError(
                f"{self._where} has no certificate to trust ({error.certificate_error}); set SSL_CERT_FILE to "
                "your authority's certificates, or correct endpoint_url"
            ) from None
        except aiohttp.InvalidURL:
            raise UserError(f"{self._where} is no address; correct endpoint_url") from None
        except aiohttp.ClientPayloadError:
            raise Unusable("cut_off", "the connection ended within the answer") from None
        except aiohttp.ClientConnectorError as error:
            raise Unusable("no_connection", f"no connection: {error.strerror or error.__class__.__name__}") from None
        except (aiohttp.ClientError, OSError) as error:
            # Only the class: what aiohttp says may hold the request with its headers.
            raise Unusable("connection_lost", f"the connection broke: {error.__class__.__name__}") from None


def read_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The endpoint's key: from the file that $SLMOPS_TEACHER_API_KEY_FILE names, else from $SLMOPS_TEACHER_API_KEY.

    It is read at each start, so that a secret that was rotated counts from the next start on.

    Raises:
        ConfigError: it is empty or cannot be a key. The message does not hold it.
        ArtifactError: the file cannot be read.
    """
    if path := environment.get(TEACHER_API_KEY_FILE):
        with explain_os_errors(path), open(Path(path), "rb") as file:
            data, place = file.read(MAX_KEY_BYTES + 1), f"{path} (${TEACHER_API_KEY_FILE})"
    elif (value := environment.get(TEACHER_API_KEY)) is not None:
        data, place = value.encode(errors="surrogateescape"), f"${TEACHER_API_KEY}"
    else:
        return None
    key = data.strip()
    if not key:
        raise ConfigError(f"{place} is empty; put the endpoint's key there, or unset the variable")
    if len(key) > MAX_KEY_BYTES or not all(0x20 < byte < 0x7F for byte in key):
        raise ConfigError(
            f"{place} is no key: {len(key):,} bytes with other than printable ASCII characters, or too many"
        )
    return key.decode()


def is_loopback(host: str) -> bool:
    """Whether what is sent to `host` stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def retry_after(headers: Mapping[str, Any]) -> float | None:
    """Seconds that the server asks to wait, at most MAX_RETRY_AFTER_S; RFC 9110, 10.2.3."""
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    if value.replace(".", "", 1).isascii() and value.replace(".", "", 1).isdigit():
        seconds = float(value)
    else:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _proxy(url: str) -> dict[str, Any]:
    """What the environment says about a proxy, looked up once.

    aiohttp's own `trust_env` asks for each request, in a thread, and refuses a key for a host that is in ~/.netrc.
    """
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or is_loopback(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc):
        return {}
    address = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    plain = urlunsplit(address._replace(netloc=address.netloc.rpartition("@")[2]))
    if address.username is None:
        return {"proxy": plain}
    name, password = unquote(address.username), unquote(address.password or "")
    login = {"Proxy-Authorization": aiohttp.encode_basic_auth(name, password)}
    # A request without TLS goes to the proxy itself; for one with TLS the proxy is told with the CONNECT before it.
    return {"proxy": plain, "headers" if parts.scheme == "http" else "proxy_headers": login}


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body of a response, unless it is larger than any answer can be."""
    size = response.content_length or 0
    parts: list[bytes] = []
    if size <= limit:
        size = 0
        async for part in response.content.iter_any():
            parts.append(part)
            if (size := size + len(part)) > limit:
                break
    if size > limit:
        response.close()  # hangs up, so that the rest is not read
        raise Unusable("too_large", f"more than {limit:,} bytes", max_retries=1)
    return b"".join(parts)
