"""Serve the node's current release over OpenAI's chat completions API.

Everything that a request can make grow is bounded: body, prompt, answer, generations at once, requests that wait. A
client that goes away ends its generation. Sampling follows the model's own settings unless a request says otherwise.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from slmops.edge import node
from slmops.edge.chat import ChatRequest, InvalidRequestError, parse_request
from slmops.edge.engine import Answer, Engine, open_engine
from slmops.errors import ConfigError, explain_os_errors
from slmops.progress import log

MODEL_ID = "slmops"
"""What requests call the model: the same name on every node and for every release, so that clients never change."""
API_KEY = "SLMOPS_API_KEY"
MAX_BODY_BYTES = 1024 * 1024
RETRY_AFTER_S = 1
SHUTDOWN_S = 20
"""How long requests that are under way may go on after SIGTERM."""

T = TypeVar("T")


def serve(root: Path, host: str, port: int, api_key_file: Path | None, max_concurrency: int, max_queue: int) -> None:
    """Verify and load `<root>/current`, and serve it until SIGTERM or SIGINT.

    The API key comes from `api_key_file` or the environment variable SLMOPS_API_KEY; with neither, no key is asked for.

    Raises:
        ArtifactError: the release is missing or damaged.
        ModelError: the runtime cannot load it.
        ConfigError: an empty API key.
    """
    import uvicorn

    app = make_app(root, _api_key(api_key_file), max_concurrency, max_queue)
    log.info("serving %s on http://%s:%d/v1", app.state.release_digest, host, port)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
        h11_max_incomplete_event_size=64 * 1024,
        limit_concurrency=max_concurrency + max_queue + 64,
    )


def make_app(root: Path, api_key: str | None, max_concurrency: int, max_queue: int) -> Starlette:
    """The application, with the model loaded."""
    release, path = node.open_current(root)
    server = _Server(open_engine(path, max_concurrency), release, api_key, max_concurrency, max_queue)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        server.engine.closing.set()
        server.threads.shutdown()
        server.engine.close()

    app = Starlette(
        routes=[
            Route("/healthz", server.health),
            Route("/v1/models", server.guarded(server.models)),
            Route("/v1/chat/completions", server.guarded(server.chat), methods=["POST"]),
        ],
        exception_handlers={
            InvalidRequestError: _bad_request,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _defect,
        },
        lifespan=lifespan,
    )
    app.state.release_digest = release.release_digest
    return app


@dataclass
class _Generation:
    """A generation that runs in a thread, and what has come out of it."""

    pieces: asyncio.Queue[str | None]
    cancelled: threading.Event
    answer: asyncio.Future[Answer]

    async def texts(self) -> AsyncIterator[str]:
        """Pieces of text as they come; the generation ends when nobody listens any more."""
        try:
            while (piece := await self.pieces.get()) is not None:
                yield piece
        finally:
            self.cancelled.set()


class _Server:
    def __init__(
        self, engine: Engine, release: node.Installed, api_key: str | None, max_concurrency: int, max_queue: int
    ) -> None:
        self.engine, self.release, self.api_key = engine, release, api_key
        self.threads = ThreadPoolExecutor(max_concurrency, thread_name_prefix="generate")
        self.max_requests = max_concurrency + max_queue
        self.num_requests = 0
        self.slots = asyncio.Semaphore(max_concurrency)
        self.started_at = int(time.time())

    def guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """`handler`, for those who have the API key."""

        async def checked(request: Request) -> Response:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            if self.api_key is not None and not (
                scheme.lower() == "bearer" and hmac.compare_digest(key.encode(), self.api_key.encode())
            ):
                error = _error("a valid API key is needed: Authorization: Bearer <key>", None, "invalid_api_key")
                return JSONResponse(error, 401, {"WWW-Authenticate": "Bearer"})
            return await handler(request)

        return checked

    async def health(self, _: Request) -> Response:
        manifest = self.release.manifest
        return JSONResponse(
            {"status": "ok", "release_digest": self.release.release_digest, "variant": manifest.variant}
        )

    async def models(self, _: Request) -> Response:
        model = {"id": MODEL_ID, "object": "model", "created": self.started_at, "owned_by": "slmops"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        wanted = parse_request(await _json_body(request))
        if wanted.model != MODEL_ID:
            message = f"there is no model {wanted.model[:100]!r}, only {MODEL_ID!r}"
            raise InvalidRequestError(message, "model", 404, "model_not_found")
        if self.num_requests >= self.max_requests:
            error = _error(f"{self.num_requests} requests are under way; try again later", None, "overloaded")
            return JSONResponse(error, 503, {"Retry-After": str(RETRY_AFTER_S)})
        self.num_requests += 1
        try:
            generation = await _unless_gone(request, self._start(wanted))
        except BaseException:
            self.num_requests -= 1
            raise
        generation.answer.add_done_callback(self._finish)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": MODEL_ID}
        if wanted.stream:
            return _Stream(generation, _events(generation, wanted, head))
        return await _unless_gone(request, _whole(generation, head))

    async def _start(self, wanted: ChatRequest) -> _Generation:
        """Wait for a free thread and start the generation in it."""
        loop = asyncio.get_running_loop()
        await self.slots.acquire()
        try:
            tokens = await loop.run_in_executor(self.threads, self.engine.encode, wanted)
        except BaseException:
            self.slots.release()
            raise
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        cancelled = threading.Event()

        def send(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work() -> Answer:
            try:
                return self.engine.generate(tokens, wanted, send, cancelled)
            finally:
                send(None)

        return _Generation(pieces, cancelled, loop.run_in_executor(self.threads, work))

    def _finish(self, answer: asyncio.Future[Answer]) -> None:
        self.slots.release()
        self.num_requests -= 1
        if not answer.cancelled() and (error := answer.exception()):
            log.error("a generation failed: %s", error)


class _Stream(StreamingResponse):
    """Server-sent events; when they end, for whatever reason, so does the generation."""

    def __init__(self, generation: _Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancelled.set()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away before."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait((task, gone))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(generation: _Generation, head: dict[str, Any]) -> Response:
    text = "".join([piece async for piece in generation.texts()])
    answer = await generation.answer
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": _finish_reason(answer),
    }
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": answer.usage})


async def _events(generation: _Generation, wanted: ChatRequest, head: dict[str, Any]) -> AsyncIterator[bytes]:
    """The answer as server-sent events: https://platform.openai.com/docs/api-reference/chat-streaming."""

    def event(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _sse({**head, "object": "chat.completion.chunk", "choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    async for piece in generation.texts():
        yield event({"content": piece})
    try:
        answer = await generation.answer
    except Exception:
        yield _sse(_error("the generation failed; the server's log says why", None, None, "server_error"))
        return
    yield event({}, _finish_reason(answer))
    if wanted.include_usage:
        yield _sse({**head, "object": "chat.completion.chunk", "choices": [], "usage": answer.usage})
    yield b"data: [DONE]\n\n"


def _finish_reason(answer: Answer) -> str:
    # A generation that the server's end cut short is, to its client, cut off.
    return "length" if answer.finish_reason == "cancelled" else answer.finish_reason


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def _json_body(request: Request) -> Any:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise InvalidRequestError(f"the body has more than {MAX_BODY_BYTES:,} bytes", status=413)
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise InvalidRequestError("the body is not JSON") from None


def _error(message: str, param: str | None, code: str | None, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _bad_request(_: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidRequestError)  # noqa: S101
    return JSONResponse(_error(str(error), error.param, error.code), error.status)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    return JSONResponse(_error(error.detail, None, None), error.status_code, error.headers)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx' number for a client that closed the request


async def _defect(_: Request, __: Exception) -> Response:
    return JSONResponse(_error("the server failed; its log says why", None, None, "server_error"), 500)


def _api_key(path: Path | None) -> str | None:
    if path is None:
        key = os.environ.get(API_KEY)
        where = f"the environment variable {API_KEY}"
    else:
        with explain_os_errors(path):
            key = path.read_text().strip()
        where = str(path)
    if key is not None and not key:
        raise ConfigError(f"{where} holds an empty API key; write one into it, or leave it out")
    return key
