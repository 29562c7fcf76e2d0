"""The way from a container to the object store: what goes in on one side comes out on the other, whole."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from slmops import relay

DATA = bytes(range(256)) * 8192
"""2 MiB: more than the buffers on the way hold."""


@pytest.fixture
def echo() -> Iterator[int]:
    """The port on 127.0.0.2 of a server that sends back what it got once the client has said all."""
    with socket.create_server(("127.0.0.2", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, connection.makefile("rb") as got:
                    connection.sendall(got.read())

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def ask(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            return answer.read()


def test_both_directions_whole_and_several_connections_at_once(tmp_path: Path, echo: int) -> None:
    endpoint_url = f"http://127.0.0.2:{echo}"
    with closing(relay.offer_store(tmp_path / "store.sock", endpoint_url)):
        relay.reach_store_through(tmp_path / "store.sock", endpoint_url)
        relay.reach_store_through(tmp_path / "store.sock", endpoint_url)  # as a process started by a step would
        answers: list[bytes] = []
        asking = [threading.Thread(target=lambda: answers.append(ask(echo, DATA))) for _ in range(4)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(30)
    assert answers == [DATA] * 4


def test_a_store_that_is_gone_shows_as_a_closed_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.2", 0)) as free:
        port = free.getsockname()[1]
    endpoint_url = f"http://127.0.0.2:{port}"
    with closing(relay.offer_store(tmp_path / "store.sock", endpoint_url)):
        relay.reach_store_through(tmp_path / "store.sock", endpoint_url)
        with suppress(ConnectionResetError):
            assert ask(port, b"anyone there?") == b""


def test_addresses_of_urls() -> None:
    assert relay.address_of("http://127.0.0.1:8333") == ("127.0.0.1", 8333)
    assert relay.address_of("https://s3.example.com") == ("s3.example.com", 443)
