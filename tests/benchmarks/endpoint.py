"""Answers a second from an endpoint with 200 ms latency and 64 requests allowed in flight, beside the `openai` client.

    python -m tests.benchmarks.endpoint

The server is a double in a process of its own, kept to one core: it waits 200 ms and answers with a fixed text, so that
the client is what is measured. With faults it refuses 10 % of the requests at once (429 with Retry-After: 1) and resets
5 % after the latency. Ideal is 64 requests each 200 ms: 320 answers a second. Ours goes through the cache, as the step
does: each answer is on disk before the next is taken. The bound is what bare sockets get, which neither read nor write
JSON and know no faults: what is missing there, machine and double have lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import random
import resource
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from slmops.teachers.cache import AnswerCache
from slmops.teachers.endpoint import EndpointTeacher
from slmops.teachers.interface import Answer, Decoding, Question, question_key

LATENCY_S = 0.2
IN_FLIGHT = 64
IDEAL = IN_FLIGHT / LATENCY_S
FAULTS = {"clean": (0.0, 0.0), "10 % 429, 5 % resets": (0.10, 0.05)}
DECODING = Decoding(max_new_tokens=64)
PROMPT = "I am still waiting on my card, when will it arrive? " * 4
ANSWER = "card_arrival, because the customer asks when the card will come. " * 4


def _serve(ready: Any, refused: float, reset: float) -> None:
    chance = random.Random(1)
    choice = {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 48, "completion_tokens": 56, "total_tokens": 104}
    body = json.dumps({"id": "x", "model": "double", "created": 1, "choices": [choice], "usage": usage}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    answer = head % len(body) + body
    busy = b"HTTP/1.1 429 Too Many\r\nContent-Type: application/json\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(request.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
                fate = chance.random()
                if fate < refused:
                    writer.write(busy)
                    continue
                await asyncio.sleep(LATENCY_S)
                if fate < refused + reset:
                    connection = writer.get_extra_info("socket")
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
                    return
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextmanager
def _server(refused: float, reset: float) -> Iterator[str]:
    ready, child = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(child, refused, reset), daemon=True)
    process.start()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1 and process.pid:
        os.sched_setaffinity(process.pid, {cores[-1]})
    try:
        yield f"http://127.0.0.1:{ready.recv()}/v1"
    finally:
        process.terminate()
        process.join()


def _questions(count: int) -> Iterator[Question]:
    for number in range(count):
        messages = ({"role": "user", "content": f"{number}: {PROMPT}"},)
        yield Question(question_key(messages, DECODING, 0), messages, 0)


def ours(url: str, count: int) -> int:
    """Answers that were put into a cache."""
    teacher = EndpointTeacher("double", DECODING, url=url, model="double", max_in_flight=IN_FLIGHT)
    with tempfile.TemporaryDirectory() as directory, AnswerCache(Path(directory), teacher.identity, DECODING) as cache:
        for question, outcome in teacher.answer(q for q in _questions(count) if q.key not in cache):
            if isinstance(outcome, Answer):
                cache.put(question.key, outcome)
        return len(cache)


def peer(url: str, count: int) -> int:
    """The official client as its users run it: asyncio.gather, a semaphore, its own retries. Answers stay in memory."""

    async def main() -> int:
        slots = asyncio.Semaphore(IN_FLIGHT)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=8) as client:

            async def ask(question: Question) -> str | None:
                async with slots:
                    completion = await client.chat.completions.create(
                        model="double",
                        messages=question.messages,  # type: ignore[arg-type]
                        max_completion_tokens=DECODING.max_new_tokens,
                        temperature=0,
                    )
                return completion.choices[0].message.content

            texts = await asyncio.gather(*map(ask, _questions(count)), return_exceptions=True)
        return sum(isinstance(text, str) for text in texts)

    return asyncio.run(main())


def bound(url: str, count: int) -> int:
    """What the double gives at most."""
    port = int(url.rpartition(":")[2].partition("/")[0])
    request = b"POST / HTTP/1.1\r\nContent-Length: 400\r\n\r\n" + b" " * 400
    left = iter(range(count))

    async def ask() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answers = 0
        for _ in left:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]))
            answers += 1
        writer.close()
        return answers

    async def together() -> int:
        return sum(await asyncio.gather(*(ask() for _ in range(IN_FLIGHT))))

    return asyncio.run(together())


def main() -> None:
    """Run both in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=19200, help="questions a run (default: 19200, a minute's worth)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turns (default: 1)")
    arguments = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    print("| endpoint | client | answers | lost | answers/s | of the ideal 320/s | CPU ms an answer |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for fault, shares in FAULTS.items():
        for _ in range(arguments.rounds):
            bare = {"bare sockets (bound)": bound} if fault == "clean" else {}
            for name, run in (bare | {"slmops, with cache": ours, "openai, asyncio": peer}).items():
                with _server(*shares) as url:
                    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
                    answers = run(url, arguments.count)
                    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
                    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                rate = answers / seconds
                print(
                    f"| {fault} | {name} | {answers} | {arguments.count - answers} | {rate:.1f} | {rate / IDEAL:.3f} | "
                    f"{cpu / answers * 1000:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
