"""Passes connections on: the one way out of a container without network, a Unix socket that leads to the object store.

The runner of a pipeline listens on the socket and connects to the store; the step listens on the store's own port, on
its own loopback, and connects to the socket. So the step uses the store's usual address, and can reach nothing else.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

STORE_SOCKET = "SLMOPS_STORE_SOCKET"
"""Environment variable: the Unix socket that leads to the host and port of `$AWS_ENDPOINT_URL`."""

CHUNK_BYTES = 256 * 1024


def address_of(endpoint_url: str) -> tuple[str, int]:
    """Host and port of an http or https URL."""
    parts = urlsplit(endpoint_url)
    return parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme]


def reach_store_through(path: Path, endpoint_url: str) -> None:
    """Make the store of `endpoint_url` reachable through the Unix socket `path`, until this process ends."""
    try:
        listening = socket.create_server(("127.0.0.1", address_of(endpoint_url)[1]))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:  # a process that this one was started by has done it
            raise
    else:
        _start(_accept, listening, lambda: _connect_unix(path))


def offer_store(path: Path, endpoint_url: str) -> socket.socket:
    """Listen on the Unix socket `path` and pass on to the store of `endpoint_url`, until the result is closed."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(64)
    _start(_accept, listening, lambda: socket.create_connection(address_of(endpoint_url), timeout=10))
    return listening


def reach_store_of_environment() -> None:
    """`reach_store_through` if this process was told to."""
    if path := os.environ.get(STORE_SOCKET):
        reach_store_through(Path(path), os.environ["AWS_ENDPOINT_URL"])


def _connect_unix(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def _accept(listening: socket.socket, connect: Callable[[], socket.socket]) -> None:
    with suppress(OSError):  # it was closed
        while True:
            connection, _ = listening.accept()
            _start(_pass_on, connection, connect)


def _pass_on(near: socket.socket, connect: Callable[[], socket.socket]) -> None:
    """Both directions of one connection. A store that does not answer shows as a connection that closes."""
    with closing(near), suppress(OSError), closing(connect()) as far:
        far.settimeout(None)
        back = _start(_copy, far, near)
        _copy(near, far)
        back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(CHUNK_BYTES):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _start(function: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread
