"""Registries that want a login, mislead or are in trouble."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest

from slmops.errors import SlmopsError, StoreError, StoreUnavailable
from slmops.packaging.modelpack import pull, push
from tests.packaging.registries import (
    PASSWORD,
    USER,
    RegistryServer,
    assert_nothing_left,
    contents,
    docker_registry,
    free_port,
    password_registry,
    serving,
    token_server,
)


def test_no_registry_there(variant: Path, tmp_path: Path) -> None:
    target = f"127.0.0.1:{free_port()}/models/m:v1"
    with pytest.raises(StoreUnavailable, match="does not answer"):
        push(variant, target)
    with pytest.raises(StoreUnavailable, match="does not answer"):
        pull(target, tmp_path / "pulled")


def test_plain_http_to_other_machines_only_if_asked(
    variant: Path, registry: RegistryServer, target: str, tmp_path: Path
) -> None:
    # 0.0.0.0 leads to this machine, but is no loopback address.
    elsewhere = target.replace("127.0.0.1", "0.0.0.0")  # noqa: S104
    with pytest.raises(StoreError, match="no TLS"):
        push(variant, elsewhere)
    digest = push(variant, elsewhere, insecure=True)
    with pytest.raises(StoreError, match="no TLS"):
        pull(elsewhere, tmp_path / "pulled")
    assert pull(elsewhere, tmp_path / "pulled", insecure=True) == digest


@pytest.fixture(scope="module", params=["password", "token"])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry behind a login: asked for at the registry itself, or at a server that gives tokens."""
    directory = tmp_path_factory.mktemp("guarded")
    if request.param == "password":
        with docker_registry(directory, password_registry(directory)) as server:
            yield server
    else:
        with token_server(directory) as auth, docker_registry(directory, auth) as server:
            yield server


def test_login_from_the_environment(
    variant: Path, guarded: RegistryServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ORAS_USER", USER)
    monkeypatch.setenv("ORAS_PASS", PASSWORD)
    target = f"{guarded.host}/models/m:v1"
    digest = push(variant, target)
    assert pull(target, tmp_path / "pulled") == digest
    assert contents(tmp_path / "pulled") == contents(variant)


@pytest.mark.parametrize("folder", ["docker", ".docker"])
@pytest.mark.parametrize("helper", [False, True])
def test_login_from_dockers_config(
    variant: Path, guarded: RegistryServer, folder: str, helper: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if folder == ".docker":
        monkeypatch.delenv("DOCKER_CONFIG")
    config: dict[str, Any] = (
        {"credHelpers": {guarded.host: "test"}}
        if helper
        else {"auths": {guarded.host: {"auth": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}}}
    )
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.json").write_text(json.dumps(config))
    program = tmp_path / "docker-credential-test"
    program.write_text(f"#!/bin/sh\necho '{json.dumps({'Username': USER, 'Secret': PASSWORD})}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    target = f"{guarded.host}/models/n:v1"
    push(variant, target)
    pull(target, tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(variant)


@pytest.mark.parametrize("password", ["wrong", None])
def test_without_the_password(
    variant: Path, guarded: RegistryServer, password: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if password:
        monkeypatch.setenv("ORAS_USER", USER)
        monkeypatch.setenv("ORAS_PASS", password)
    target = f"{guarded.host}/models/m:v1"
    for call in (lambda: push(variant, target), lambda: pull(target, tmp_path / "pulled")):
        with pytest.raises(StoreError, match="docker login"):
            call()
    assert_nothing_left(tmp_path / "pulled")


def test_broken_dockers_config(variant: Path, guarded: RegistryServer, tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        push(variant, f"{guarded.host}/models/m:v1")


class Misleading(BaseHTTPRequestHandler):
    """A registry that wants a password, and names another host for the upload."""

    elsewhere = ""
    seen: ClassVar[list[tuple[str, bool]]] = []

    def do_HEAD(self) -> None:
        self._answer(404 if self.headers.get("Authorization") else 401)

    def do_POST(self) -> None:
        self._answer(202)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(201)

    def _answer(self, code: int) -> None:
        self.seen.append((self.command, "Authorization" in self.headers))
        self.send_response(code)
        self.send_header("WWW-Authenticate", 'Basic realm="r"')
        self.send_header("Location", self.elsewhere)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_login_goes_to_no_other_host(variant: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORAS_USER", USER)
    monkeypatch.setenv("ORAS_PASS", PASSWORD)

    class Other(Misleading):
        seen: ClassVar[list[tuple[str, bool]]] = []

    with serving(Other) as other:

        class First(Misleading):
            elsewhere = f"http://{other}/upload"
            seen: ClassVar[list[tuple[str, bool]]] = []

        with serving(First) as host:
            push(variant, f"{host}/models/m:v1")
    assert set(First.seen) == {("HEAD", False), ("HEAD", True), ("POST", True), ("PUT", True)}
    assert set(Other.seen) == {("PUT", False)}


def test_refuses_to_log_in_over_plain_http_elsewhere(variant: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asking(Misleading):
        def do_HEAD(self) -> None:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Bearer realm="http://login.example/token",service="x"')
            self.send_header("Content-Length", "0")
            self.end_headers()

    with serving(Asking) as host, pytest.raises(StoreError, match="not https"):
        push(variant, f"{host}/models/m:v1")


def test_refuses_to_be_sent_on_over_plain_http(
    variant: Path, registry: RegistryServer, target: str, tmp_path: Path
) -> None:
    """A blob has a digest, a manifest by its tag has not: whoever is on the way could give another."""
    push(variant, target)
    host = target.partition("/")[0]

    class SendingOn(Misleading):
        elsewhere = ""

        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", f"{self.elsewhere}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

    with serving(SendingOn) as first:
        asked = target.replace(host, first)
        SendingOn.elsewhere = f"http://{host}"
        assert pull(asked, tmp_path / "on this machine")
        SendingOn.elsewhere = f"http://{host}".replace("127.0.0.1", "0.0.0.0")  # noqa: S104
        with pytest.raises(StoreError, match=r"names 'http://0\.0\.0\.0:.* which is not https; it is refused"):
            pull(asked, tmp_path / "pulled")
        assert pull(asked, tmp_path / "pulled", insecure=True)


@pytest.mark.parametrize(("code", "kind"), [(500, StoreUnavailable), (429, StoreUnavailable), (405, StoreError)])
def test_registry_in_trouble(variant: Path, code: int, kind: type[SlmopsError]) -> None:
    class Troubled(Misleading):
        def do_HEAD(self) -> None:
            self._answer(code)

    with serving(Troubled) as host, pytest.raises(kind, match=str(code)):
        push(variant, f"{host}/models/m:v1")
