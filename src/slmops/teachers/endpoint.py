"""A teacher behind an endpoint: any server with OpenAI's API.

The questions are pulled in the caller's thread. The requests run on an event loop in a thread of its own, so that
answers come in, and time-outs are true, while the caller writes to a disk or looks for the next question.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Self
from urllib.parse import urlsplit

from slmops.config import TEACHER_API_KEY, TEACHER_API_KEY_FILE
from slmops.errors import SlmopsError, TransientError, UserError
from slmops.progress import log
from slmops.teachers import openai_api
from slmops.teachers.budget import Budget
from slmops.teachers.connection import Connection, is_loopback, retry_after
from slmops.teachers.interface import Answer, Decoding, Failure, Question
from slmops.teachers.openai_api import Api, Dialect, Unusable

ANY_MODEL = "default"
"""The name that takes whatever is served."""
BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
DOWN_AFTER_FAILURES, DOWN_AFTER_S = 32, 120.0
"""An endpoint is down once this many attempts in a row have failed, over at least this long."""
AHEAD = 3
"""Questions in hand for each that may be on its way: the others wait for a slot, or for their next attempt. With more
of them, a server that limits the rate would be asked more often in vain."""
PROBLEMS_INTERVAL_S = 30.0
PROBE = Question("", ({"role": "user", "content": "Say yes."},), 0)
"""Asked if a question is refused before any was answered: is it this question, or how all are asked?"""


class EndpointTeacher:
    """Asks an endpoint, many questions at a time. Its answers come in any order.

    `answer` ends with `BudgetExceeded` if questions are left when the budget is used up. Before that, and before any
    other UserError, it yields what was on its way.
    """

    def __init__(
        self,
        name: str,
        decoding: Decoding,
        *,
        url: str,
        model: str = ANY_MODEL,
        api: Api = "chat",
        key: str | None = None,
        max_in_flight: int = 32,
        timeout_s: float = 600.0,
        max_retries: int = 8,
        budget: Budget | None = None,
    ) -> None:
        """
        Args:
            name: What rows and counts call it.
            decoding: How it shall answer.
            url: Base address, such as https://host/v1.
            model: Its name there; `default` for whatever is served.
            api: `chat`: the server applies the chat template; `completions`: turns are joined as plain text.
            key: From `read_key`. It is sent to `url` and nowhere else.
            max_in_flight: Requests on their way at once. Twice as many questions may wait for a slot or a retry.
            timeout_s: Of one request, from its start to the last byte of its answer.
            max_retries: Further attempts at a question, after anything that may pass.
            budget: What may be spent; several teachers may share one.
        """
        self.name, self.decoding = name, decoding
        self.identity: Mapping[str, str | int | float] = {
            "kind": "endpoint",
            "url": url.rstrip("/"),
            "model": model,
            "api": api,
        }
        self.url, self.model, self.api = url.rstrip("/"), model, api
        self.max_in_flight, self.timeout_s, self.max_retries = max_in_flight, timeout_s, max_retries
        self.budget = budget or Budget()
        self.served = ""
        """What the server says that it is; empty before the first answer."""
        self._key = key
        self._dialect = Dialect()
        host = urlsplit(url).hostname or ""
        if key and url.startswith("http:") and not is_loopback(host):
            log.warning("the key goes to %s without encryption; use https:// where the network is not trusted", host)

    def answer(self, questions: Iterable[Question]) -> Generator[tuple[Question, Answer | Failure]]:
        """Answer `questions`. Closing the generator cancels what is on its way: use it within `contextlib.closing`, so
        that a caller that fails does not go on paying.

        Raises:
            UserError: the endpoint refuses key, model or parameters, or the budget is used up.
            TransientError: it does not answer any more.
        """
        source = iter(questions)
        in_hand, more = 0, True
        with _Run(self) as run:
            while True:
                while more and in_hand < AHEAD * self.max_in_flight and run.stopped_by is None:
                    question = next(source, None)
                    if question is None:
                        more = False
                        break
                    run.ask(question)
                    in_hand += 1
                    if not run.results.empty():
                        break
                if not in_hand:
                    break
                result = run.results.get()
                if isinstance(result, BaseException):
                    raise result
                in_hand -= 1
                question, outcome = result
                if outcome is not None:
                    yield question, outcome
            run.check()

    def close(self) -> None:
        """Nothing is kept between calls of `answer`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Run:
    """One call of `answer`: its event loop, and what it has learned of the endpoint."""

    def __init__(self, teacher: EndpointTeacher) -> None:
        self.teacher = teacher
        self.where = f"{teacher.url.partition('?')[0]} ({teacher.model})"
        self.results: queue.SimpleQueue[tuple[Question, Answer | Failure | None] | BaseException] = queue.SimpleQueue()
        """Each question that was asked once; with None if it was not sent after all."""
        self.stopped_by: SlmopsError | None = None
        """Why no new request starts."""
        self._num_answers = self._num_unreached = self._num_lost = 0
        self._failures_in_a_row = 0
        self._last_good = self._told_at = time.monotonic()
        self._last_failure = ""
        self._problems: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"ask {teacher.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if not self.results.empty() and isinstance(error := self.results.get(), BaseException):
            raise error
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def ask(self, question: Question) -> None:
        """Take a question in hand; its outcome comes with `results`."""
        self._loop.call_soon_threadsafe(self._start, question)

    def check(self) -> None:
        """Raise what stopped the run, or that nothing was ever reached."""
        if self.stopped_by is None and not self._num_answers and 0 < self._num_lost == self._num_unreached:
            self.stopped_by = self._down()
        if self.stopped_by is not None:
            raise self.stopped_by

    # --- in the thread of the loop

    def _work(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # a defect: the caller must not wait for ever
            self.results.put(error)
        finally:
            self._ready.set()

    async def _main(self) -> None:
        teacher = self.teacher
        self._loop, self._end, self._stopped = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._slots = asyncio.Semaphore(teacher.max_in_flight)
        self._model: asyncio.Task[str] | None = None
        self._probe: asyncio.Task[int] | None = None
        async with Connection(
            teacher.url,
            teacher._key,
            timeout_s=teacher.timeout_s,
            max_bytes=openai_api.max_answer_bytes(teacher.decoding),
            where=self.where,
        ) as self._connection:
            self._ready.set()
            await self._end.wait()
            tasks = [*self._tasks, *filter(None, (self._model, self._probe))]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, question: Question) -> None:
        task = self._loop.create_task(self._ask(question))
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.results.put(error)

    def _stop(self, error: SlmopsError) -> None:
        """Start no more requests; those on their way go on."""
        if self.stopped_by is None:
            self.stopped_by = error
            self._stopped.set()

    async def _ask(self, question: Question) -> None:
        """Ask until there is an answer, or no hope of one."""
        retries = 0
        while True:
            async with self._slots:
                if not self.teacher.budget.left():
                    self._stop(self.teacher.budget.exceeded())
                if self.stopped_by is not None:
                    return self.results.put((question, None))
                try:
                    return self.results.put((question, await self._attempt(question)))
                except Unusable as error:
                    problem = error
                except UserError as error:
                    self._stop(error)
                    return self.results.put((question, None))
            self._note(problem)
            if retries >= min(self.teacher.max_retries, problem.max_retries):
                return self.results.put((question, self._given_up(problem, retries)))
            await self._pause(_delay(retries, problem.after_s))
            retries += 1

    async def _attempt(self, question: Question) -> Answer | Failure:
        """Send the question once, or again at once if the server must be asked in another way.

        Raises:
            Unusable: no answer, but there may be one next time.
            UserError: the endpoint cannot be asked at all.
        """
        teacher = self.teacher
        model = await self._model_name()
        known = dialect = teacher._dialect
        while True:
            body = openai_api.request_body(question, teacher.decoding, model, teacher.api, dialect)
            status, headers, data = await self._connection.send("POST", openai_api.PATHS[teacher.api], body)
            if status == 200:
                if not dialect.extras and teacher._dialect.extras:
                    self._adopt(dialect, "parameters beyond OpenAI's")
                return self._accept(data)
            words = openai_api.words_of_error(data)
            if status in (400, 422) and not openai_api.TOO_LONG.search(words):
                if teacher._dialect != known:
                    known = dialect = teacher._dialect  # another question has found out meanwhile
                    continue
                if (other := dialect.without(words, teacher.decoding)) is not None:
                    self._adopt(other, self._quote(words, question))
                    known = dialect = other
                    continue
                if dialect.extras and not self._num_answers:
                    dialect = replace(dialect, extras=False)  # not every server says what it does not know
                    continue
            failure = self._refused(status, headers, words, question)
            if failure.reason == "refused":
                await self._check_that_others_are_answered(status, words, question)
            return failure

    def _adopt(self, dialect: Dialect, refused: str) -> None:
        log.info("%s is asked without what it refuses: %s", self.where, refused)
        self.teacher._dialect = dialect

    def _accept(self, data: bytes) -> Answer:
        """The answer in a response; counted, and paid for."""
        teacher = self.teacher
        payload = openai_api.parse(data)
        try:
            answer = openai_api.read_answer(payload, teacher.api)
        except Unusable as error:
            teacher.budget.spend(*error.usage)
            raise
        if teacher.budget.limited and not answer.num_prompt_tokens + answer.num_tokens:
            raise UserError(f"{self.where} does not say how many tokens it used, so no budget can be kept; set none")
        teacher.budget.spend(answer.num_prompt_tokens, answer.num_tokens)
        self._check_model(answer.model)
        self._num_answers += 1
        self._failures_in_a_row, self._last_good = 0, time.monotonic()
        return answer

    def _check_model(self, served: str) -> None:
        teacher = self.teacher
        if teacher.model != ANY_MODEL:
            if served and not openai_api.same_model(teacher.model, served):
                raise UserError(
                    f"{self.where} serves another model: {served[:200]!r}; set endpoint_model to the one you want, or "
                    f"to {ANY_MODEL!r} to take what is served"
                )
        elif teacher.served and served != teacher.served:
            raise UserError(
                f"{self.where} changed its model from {teacher.served[:200]!r} to {served[:200]!r} within a run; set "
                "endpoint_model to the one you want"
            )
        teacher.served = served

    def _refused(self, status: int, headers: Mapping[str, str], words: str, question: Question) -> Failure:
        """What a status other than 200 means.

        Raises:
            Unusable: it may pass.
            UserError: it will not.
        """
        said = self._quote(words, question)
        if status in (401, 403):
            place = f"the file that ${TEACHER_API_KEY_FILE} names, or into ${TEACHER_API_KEY}"
            what = "refuses the key" if self.teacher._key else "wants a key"
            raise UserError(f"{self.where} {what} ({status}); put a valid one into {place}")
        if status == 402 or "insufficient_quota" in words:
            raise UserError(f"{self.where} has no credit left for this key ({status}){said}")
        if status == 413 or (status != 429 and openai_api.TOO_LONG.search(words)):
            return Failure("prompt_too_long", f"status {status}")
        if self.teacher.decoding.top_logprobs and "logprobs" in words:
            raise UserError(f"{self.where} gives no log-probabilities as asked ({status}){said}; set top_logprobs to 0")
        if status in (408, 409, 425, 429) or status >= 500:
            reason = "rate_limited" if status == 429 else "server_error"
            raise Unusable(reason, f"status {status}", after_s=retry_after(headers))
        if 300 <= status < 400:
            target = headers.get("Location", "nowhere").partition("?")[0][:200]
            raise UserError(f"{self.where} redirects to {target} ({status}); set endpoint_url to where it really is")
        if status in (404, 405):
            raise UserError(
                f"{self.where} has no such model or address ({status}){said}; check endpoint_url and endpoint_model"
            )
        if openai_api.FILTERED.search(words):
            return Failure("content_filter", f"status {status}")
        return Failure("refused", f"status {status}")

    async def _check_that_others_are_answered(self, status: int, words: str, question: Question) -> None:
        """Find out whose fault a refusal is.

        Raises:
            UserError: the endpoint refuses whatever it is asked.
        """
        if not self._num_answers:
            if self._probe is None or (self._probe.done() and self._probe.exception() is not None):
                self._probe = self._loop.create_task(self._ask_probe())
            if await asyncio.shield(self._probe) in (400, 422):
                raise UserError(f"{self.where} refuses what it is asked ({status}){self._quote(words, question)}")
        log.warning("%s refuses a question (%d)%s", self.where, status, self._quote(words, question))

    async def _ask_probe(self) -> int:
        teacher, model = self.teacher, await self._model_name()
        plain = replace(teacher._dialect, extras=False)
        body = openai_api.request_body(PROBE, teacher.decoding, model, teacher.api, plain)
        return (await self._connection.send("POST", openai_api.PATHS[teacher.api], body))[0]

    async def _model_name(self) -> str:
        """What to send as model: for `default`, the only one that the server lists."""
        if self.teacher.model != ANY_MODEL:
            return self.teacher.model
        if self._model is None or (self._model.done() and self._model.exception() is not None):
            self._model = self._loop.create_task(self._find_model())
        return await asyncio.shield(self._model)

    async def _find_model(self) -> str:
        status, headers, data = await self._connection.send("GET", "models", None)
        if status in (401, 403, 429) or status >= 500:
            self._refused(status, headers, "", Question("", (), 0))
        try:
            return (openai_api.single_model(openai_api.parse(data)) if status == 200 else None) or ANY_MODEL
        except Unusable:
            return ANY_MODEL  # a server that lists nothing takes any name
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None

    def _note(self, problem: Unusable) -> None:
        """Keep count of what went wrong, to notice an endpoint that is down."""
        self._failures_in_a_row += 1
        self._last_failure = problem.detail
        self._problems[problem.reason] += 1
        now = time.monotonic()
        if now - self._told_at >= PROBLEMS_INTERVAL_S:
            self._told_at = now
            counts = ", ".join(f"{reason} {count}" for reason, count in self._problems.most_common())
            log.info("%s: %d answers; attempts that gave none: %s", self.where, self._num_answers, counts)
        silent_s = now - self._last_good
        if self._failures_in_a_row >= DOWN_AFTER_FAILURES and silent_s >= DOWN_AFTER_S and self.stopped_by is None:
            self._stop(self._down())
            self.results.put(self._down())  # what is on its way would only wait for its time-out

    def _down(self) -> TransientError:
        return TransientError(
            f"{self.where} does not answer ({self._last_failure}, {self._failures_in_a_row} attempts in a row); start "
            "it, or run the same command again later: answers that came are kept"
        )

    def _given_up(self, problem: Unusable, retries: int) -> Failure:
        self._num_lost += 1
        self._num_unreached += problem.reason == "no_connection"
        return Failure(problem.reason, f"{problem.detail}, after {retries + 1} attempts")

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond the end of the run."""
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except TimeoutError:
            return

    def _quote(self, words: str, question: Question) -> str:
        """What the server said, for an error message; nothing if it repeats the key or a part of the prompt."""
        key = self.teacher._key
        starts = [turn["content"].strip()[:24] for turn in question.messages]
        if not words or (key and key in words) or any(start and start in words for start in starts):
            return ""
        return f": {' '.join(words.split())[:300]}"


def _delay(retries: int, after_s: float | None) -> float:
    """Seconds to the next attempt: what the server wishes and a little, else exponential back-off with full jitter.

    Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
    """
    if after_s is not None:
        return after_s + random.uniform(0, BACKOFF_S)
    return random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2**retries))
