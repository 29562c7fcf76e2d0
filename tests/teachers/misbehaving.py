"""A server with OpenAI's API that misbehaves as real ones do, on real sockets.

It is a double: it answers a prompt with the prompt in capitals. What it does before that is scripted for each prompt.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

BIG_BYTES = 10_000_000


@dataclass(frozen=True)
class Reply:
    """One response, or what there is in place of one."""

    status: int = 200
    payload: Mapping[str, Any] | None = None
    """The body as JSON; None for a proper answer."""
    body: bytes | None = None
    """The body as it is."""
    headers: Mapping[str, str] = field(default_factory=dict)
    end: str = ""
    """`hang`, `reset` (before any answer), `cut` (close in mid-answer), `big`, `big_chunked`; empty for a whole one."""
    delay_s: float = 0.0


OK = Reply()
HANG, RESET, CUT = Reply(end="hang"), Reply(end="reset"), Reply(end="cut")
BIG, BIG_CHUNKED = Reply(end="big"), Reply(end="big_chunked")
HALF_JSON = Reply(body=b'{"id": "1", "choices": [{"index": 0, "message": {"role": "assi')
HTML = Reply(body=b"<html>Bad gateway, but with status 200</html>", headers={"Content-Type": "text/html"})


def completion(
    text: str | None, *, finish_reason: Any = "stop", model: str = "big-v3", **message: Any
) -> dict[str, Any]:
    """A chat completion of three prompt tokens and five answer tokens."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": usage}


def error(status: int, message: str = "no", headers: Mapping[str, str] | None = None, **fields: Any) -> Reply:
    return Reply(status, {"error": {"message": message, **fields}}, headers=headers or {})


EMPTY = Reply(payload=completion(""))


class Server:
    """What it was asked, and how it answers."""

    def __init__(self) -> None:
        self.url = ""
        self.script: dict[str, list[Reply]] = {}
        """For each prompt, what happens to the first requests; the next is answered."""
        self.always: Callable[[dict[str, Any]], Reply | None] = lambda _: None
        """What happens to each request of which the script says nothing."""
        self.models: Sequence[str] | None = ("big-v3",)
        """What it lists; None for a server without such a list."""
        self.key = ""
        self.delay_s = 0.0
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = self.bytes_sent = self.num_hung_up = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._one(head.decode(), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.num_hung_up += 1
        finally:
            writer.close()

    async def _one(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.headers.append(headers)
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            await self._send(writer, error(401, f"wrong key {self.key}, but {headers.get('authorization')}"))
            return
        if request.startswith("GET"):
            models = {"data": [{"id": name} for name in self.models or ()]}
            await self._send(writer, Reply(404, {}) if self.models is None else Reply(payload=models))
            return
        asked = json.loads(body)
        prompt = asked["messages"][-1]["content"] if "messages" in asked else asked["prompt"]
        self.bodies.append(asked)
        self.asked[prompt] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        scripted = self.script.get(prompt)
        reply = scripted.pop(0) if scripted else self.always(asked) or OK
        try:
            await asyncio.sleep(reply.delay_s or self.delay_s)
            if reply.end == "hang":
                await reader.read()
        finally:
            self.in_flight -= 1
        if reply.payload is None and reply.body is None:
            reply = Reply(reply.status, completion(prompt.upper()), headers=reply.headers, end=reply.end)
        await self._send(writer, reply)

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply) -> None:
        if reply.end == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            raise ConnectionResetError
        data = reply.body if reply.body is not None else json.dumps(reply.payload).encode()
        chunked = reply.end == "big_chunked"
        size = (
            "Transfer-Encoding: chunked"
            if chunked
            else f"Content-Length: {BIG_BYTES if reply.end == 'big' else len(data)}"
        )
        fields = {"Content-Type": "application/json", **reply.headers}
        head = [f"HTTP/1.1 {reply.status} Word", size, *(f"{name}: {value}" for name, value in fields.items())]
        writer.write("\r\n".join([*head, "", ""]).encode())
        if reply.end == "cut":
            writer.write(data[: len(data) // 2])
            await writer.drain()
            raise ConnectionResetError
        if reply.end.startswith("big"):
            block = b" " * 65536
            for _ in range(BIG_BYTES // len(block)):
                writer.write(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
                await writer.drain()
                self.bytes_sent += len(block)
            writer.write(b"0\r\n\r\n" if chunked else b"")
            return
        writer.write(data)
        await writer.drain()


@contextmanager
def serving(server: Server | None = None) -> Iterator[Server]:
    """Run a server in a thread of its own."""
    server = server or Server()
    loop, started, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def main() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=1 << 20)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
        started.set()
        await stop.wait()
        listening.close()
        for _ in range(3):  # closing a connection takes a turn of the loop
            await asyncio.sleep(0.01)  # a task that is cancelled before its first step never closes what it was given
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)

    def work() -> None:
        loop.run_until_complete(main())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
