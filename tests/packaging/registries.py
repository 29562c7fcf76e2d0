"""Registries on loopback: Debian's docker-registry, open or behind a login, and a server that gives tokens."""

from __future__ import annotations

import base64
import datetime
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from slmops.demo import processes

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
USER, PASSWORD = "someone", "correct horse"
HTPASSWD = f"{USER}:$2b$04$sw44u6Vq7lIanUITS1Awf.RIg3mlgkpFw8iksk3gzGj6WHlBUaEV.\n"
"""What `htpasswd -B` would write for PASSWORD."""


@dataclass(frozen=True)
class RegistryServer:
    """A running registry."""

    host: str
    storage: Path

    def blob(self, digest: str) -> Path:
        """The file of a blob in the registry's own storage."""
        found = digest.removeprefix("sha256:")
        return self.storage / f"docker/registry/v2/blobs/sha256/{found[:2]}/{found}/data"

    def read(self, path: str) -> bytes:
        """GET /v2/…, by nothing of ours."""
        response = requests.get(f"http://{self.host}/v2/{path}", headers={"Accept": MANIFEST_TYPE}, timeout=10)
        response.raise_for_status()
        return response.content

    def write_manifest(self, path: str, data: bytes) -> None:
        """PUT /v2/…, by nothing of ours."""
        url, headers = f"http://{self.host}/v2/{path}", {"Content-Type": MANIFEST_TYPE}
        requests.put(url, data, headers=headers, timeout=10).raise_for_status()

    def write_blob(self, repository: str, data: bytes, digest: str) -> None:
        start = requests.post(f"http://{self.host}/v2/{repository}/blobs/uploads/", timeout=10)
        requests.put(f"{start.headers['Location']}&digest={digest}", data, timeout=10).raise_for_status()


@contextmanager
def docker_registry(directory: Path, auth: dict[str, Any] | None = None) -> Iterator[RegistryServer]:
    """Debian's registry with its storage in `directory`; it ends with the block, or with this process."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("no docker-registry here; `apt-get install docker-registry` brings it")
    port = free_port()
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}},
        "http": {"addr": f"0.0.0.0:{port}"},
        "log": {"level": "error", "accesslog": {"disabled": True}},
    } | ({"auth": auth} if auth else {})
    config = directory / "config.yml"
    config.write_text(json.dumps(settings))
    with open(directory / "registry.log", "wb") as log:
        server = processes.start([program, "serve", str(config)], stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/v2/", directory / "registry.log")
        yield RegistryServer(f"127.0.0.1:{port}", directory / "storage")
    finally:
        server.terminate()
        server.wait()


def password_registry(directory: Path) -> dict[str, Any]:
    """Settings of a registry that takes a password itself."""
    (directory / "htpasswd").write_text(HTPASSWD)
    return {"htpasswd": {"realm": "basic-realm", "path": str(directory / "htpasswd")}}


@contextmanager
def token_server(directory: Path) -> Iterator[dict[str, Any]]:
    """Settings of a registry that takes tokens, as public ones do, and the server that gives them for the password."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "login")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (directory / "login.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    chain = [base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()]
    expected = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    def token(service: str, scopes: list[str]) -> str:
        access = []
        for scope in scopes:
            kind, repository, actions = scope.split(":")
            access.append({"type": kind, "name": repository, "actions": actions.split(",")})
        seconds = int(time.time())
        claims = {
            "iss": "login", "sub": USER, "aud": service, "iat": seconds, "nbf": seconds - 10, "exp": seconds + 300,
            "jti": "1", "access": access,
        }  # fmt: skip
        header = {"typ": "JWT", "alg": "RS256", "x5c": chain}
        signed = b".".join(_base64(json.dumps(part).encode()) for part in (header, claims))
        signature = key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        return (signed + b"." + _base64(signature)).decode()

    class Login(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            known = self.headers.get("Authorization") == expected
            body = json.dumps({"token": token(query["service"][0], query.get("scope", []))} if known else {}).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Login) as host:
        yield {
            "token": {
                "realm": f"http://{host}/token",
                "service": "registry",
                "issuer": "login",
                "rootcertbundle": str(directory / "login.pem"),
            }
        }


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Host and port of a server on loopback with this handler."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            if requests.get(url, timeout=5).status_code in (200, 401):
                return
        except requests.RequestException:
            pass
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def assert_nothing_left(directory: Path) -> None:
    """Neither `directory` nor a part of it beside it."""
    assert not directory.exists()
    assert not list(directory.parent.glob("*.partial")) + list(directory.parent.glob(".*.partial"))
