"""A served model: lm_eval's own clients of OpenAI's API, with slmops' key and errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from lm_eval.models.utils import postprocess_generated_text

from slmops import __version__
from slmops.config import TEACHER_API_KEY, TEACHER_API_KEY_FILE
from slmops.errors import ConfigError, SlmopsError, TransientError, UserError
from slmops.lm_evaluate.config import LmEvaluateConfig
from slmops.lm_evaluate.quiet import Count
from slmops.teachers import openai_api
from slmops.teachers.connection import Connection, read_key
from slmops.teachers.openai_api import Unusable

ANY_MODEL = "default"
SERVED = "served"
MAX_ANSWER_BYTES = 16 * 1024 * 1024
PROBE_TIMEOUT_S = 60.0


def refuse_scores(kinds: Mapping[str, str], config: LmEvaluateConfig) -> None:
    """Refuse tasks that want log-probabilities of an endpoint that has none by its API.

    Args:
        kinds: What each task wants, see `tasks.request_types`.

    Raises:
        ConfigError: naming all of them.
    """
    wanting = sorted(name for name, kind in kinds.items() if kind != "generate_until")
    if wanting and config.endpoint_api == "chat":
        raise _no_scores(wanting, "the chat API gives none of a given text")


def open_endpoint(config: LmEvaluateConfig, kinds: Mapping[str, str], count: Count) -> Any:
    """lm_eval's client of the endpoint, after a look whether it is there and gives what the tasks want.

    Raises:
        ConfigError: it gives no log-probabilities, or a setting is missing.
        UserError: it refuses the key or the model.
        TransientError: it does not answer.
    """
    refuse_scores(kinds, config)
    key, wanting = read_key(), sorted(name for name, kind in kinds.items() if kind != "generate_until")
    model = asyncio.run(_look(config, key, wanting))
    client = _Chat if config.endpoint_api == "chat" else _Completions
    base, _, query = config.endpoint_url.partition("?")
    address = f"{base.rstrip('/')}/{openai_api.PATHS[config.endpoint_api]}" + (f"?{query}" if query else "")
    # With headers of its own a client does not look for the key of another service in $OPENAI_API_KEY.
    headers = {"User-Agent": f"slmops/{__version__}"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        return client(
            count,
            model=model,
            base_url=address,
            header=headers,
            num_concurrent=config.max_in_flight,
            max_retries=config.max_retries + 1,
            timeout=int(config.request_timeout_s),
            max_gen_toks=config.max_new_tokens,
            max_length=config.max_length,
            seed=config.seed,
            **_tokenizer(config, key, scores=bool(wanting)),
        )
    except ModuleNotFoundError as error:
        raise ConfigError(f"lm_eval's clients are not whole: {error}; pip install 'slmops[optimize]'") from None
    except (OSError, ValueError, RuntimeError) as error:  # of a tokenizer, here or at the endpoint
        raise ConfigError(
            f"tokens cannot be counted with endpoint_tokenizer={config.endpoint_tokenizer} "
            f"({str(error).splitlines()[0]}); set it to a directory with the tokenizer of the served model"
        ) from None


def _tokenizer(config: LmEvaluateConfig, key: str | None, *, scores: bool) -> dict[str, Any]:
    """Arguments of a client that say how tokens are counted, where they have to be."""
    if config.endpoint_api == "chat" or not (scores or config.apply_chat_template):
        return {"tokenizer_backend": None, "tokenized_requests": False}
    if config.endpoint_tokenizer != SERVED:
        return {"tokenizer_backend": "huggingface", "tokenizer": config.endpoint_tokenizer}
    if config.apply_chat_template:
        raise ConfigError(
            "apply_chat_template with endpoint_api=completions needs the model's template here; set endpoint_tokenizer "
            "to its directory, or endpoint_api=chat"
        )
    return {"tokenizer_backend": "remote", "auth_token": key}


async def _look(config: LmEvaluateConfig, key: str | None, wanting: list[str]) -> str:
    """Whether the endpoint is there and scores a text, if tasks want that; returns the model's name there."""
    where = config.endpoint_url.partition("?")[0]
    timeout_s = min(config.request_timeout_s, PROBE_TIMEOUT_S)
    async with Connection(
        config.endpoint_url, key, timeout_s=timeout_s, max_bytes=MAX_ANSWER_BYTES, where=where
    ) as connection:
        try:
            status, _, data = await connection.send("GET", "models", None)
            if status in (401, 403) or status >= 500:
                raise _refusal(status, data.decode(errors="replace"), where, key is not None)
            model = _model(config, status, data, where)
            if wanting:
                await _probe_scores(connection, model, wanting)
        except Unusable as error:
            raise TransientError(
                f"{where} does not answer: {error.detail}; check endpoint_url and the server"
            ) from None
    return model


def _model(config: LmEvaluateConfig, status: int, data: bytes, where: str) -> str:
    if config.endpoint_model != ANY_MODEL:
        return config.endpoint_model
    try:
        return (openai_api.single_model(openai_api.parse(data)) if status == 200 else None) or ANY_MODEL
    except Unusable:
        return ANY_MODEL  # a server that lists nothing takes any name
    except UserError as error:
        raise ConfigError(f"{where}: {error}") from None


async def _probe_scores(connection: Connection, model: str, wanting: list[str]) -> None:
    """Ask for the log-probabilities of two words, as lm_eval asks for those of its texts.

    Raises:
        ConfigError: there are none.
    """
    asked = {"model": model, "prompt": "one two", "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    status, _, data = await connection.send("POST", "completions", json.dumps(asked).encode())
    try:
        given = json.loads(data)["choices"][0]["logprobs"]["token_logprobs"] if status == 200 else []
    except (ValueError, LookupError, TypeError):
        given = []
    if len(given or []) < 3:
        raise _no_scores(wanting, f"this one gave none ({status})")


def _no_scores(wanting: list[str], why: str) -> ConfigError:
    return ConfigError(
        f"{', '.join(wanting)}: log-probabilities are wanted, and {why}; take tasks whose output_type is "
        "generate_until, a server whose completions have echo and logprobs (vLLM) with endpoint_api=completions, or "
        "target=model"
    )


def _refusal(status: int, body: str, where: str, has_key: bool) -> SlmopsError:
    """What a status other than 200 means."""
    said = openai_api.words_of_error(body.encode())[:300]
    if status in (401, 403):
        what = "refuses the key" if has_key else "wants a key"
        place = f"the file that ${TEACHER_API_KEY_FILE} names, or into ${TEACHER_API_KEY}"
        return UserError(f"{where} {what} ({status}); put a valid one into {place}")
    if status in (408, 409, 425, 429) or status >= 500:
        return TransientError(f"{where} does not answer now ({status}: {said}); try again later")
    if status in (404, 405):
        return UserError(f"{where} has no such model or address ({status}: {said}); check endpoint_url, endpoint_model")
    return UserError(
        f"{where} refuses what a task asks ({status}: {said}); change its generation_kwargs, or leave it out"
    )


class _Refused(BaseException):
    """A request that no repetition will get through. lm_eval repeats after whatever is an Exception."""

    def __init__(self, error: SlmopsError) -> None:
        super().__init__(str(error))
        self.error = error


class _Client:
    """What both of lm_eval's clients get: a count, errors that say what to do, and an end once a request is refused."""

    _count: Count
    _parent: Any
    """lm_eval's class."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        answers = self._counted("generate_until", requests)
        # A server takes four stop strings at most; the others end the text here. One that only thinks answers nothing.
        stops = [request.args[1].get("until") or [] for request in requests]
        return [postprocess_generated_text(a or "", s, None) for a, s in zip(answers, stops, strict=True)]

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._counted("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return self._counted("loglikelihood_rolling", requests)

    def _counted(self, kind: str, requests: list[Any]) -> list[Any]:
        """What lm_eval's method `kind` says to `requests`."""
        self._count.start(kind, len(requests))
        try:
            return list(getattr(self._parent, kind)(self, requests))
        except _Refused as refused:
            raise refused.error from None

    async def amodel_call(
        self,
        session: aiohttp.ClientSession,
        sem: asyncio.Semaphore,
        messages: Any,
        *,
        generate: bool = True,
        ctxlens: list[int] | None = None,
        gen_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> Any:
        """One request; lm_eval repeats it after any error."""
        client: Any = self
        settings = json.loads(json.dumps(gen_kwargs))
        asked = client.create_message(messages)
        body = client._create_payload(asked, generate=generate, gen_kwargs=settings, seed=client._seed)
        async with sem:
            answer = await self._send(session, client.base_url, body, client.header)
        self._count.advance()
        if generate:
            return client.parse_generations(outputs=answer)
        return client.parse_logprobs(outputs=answer, tokens=messages, ctxlens=ctxlens)

    async def _send(self, session: aiohttp.ClientSession, url: str, body: object, headers: dict[str, str]) -> Any:
        where = url.partition("?")[0]
        try:
            async with session.post(url, json=body, headers=headers, allow_redirects=False) as response:
                status, text = response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TransientError(f"{where} stopped answering ({type(error).__name__}); try again later") from None
        if status != 200:
            failure = _refusal(status, text, where, "Authorization" in headers)
            raise failure if isinstance(failure, TransientError) else _Refused(failure)
        try:
            answer = openai_api.parse(text.encode())
        except Unusable as error:
            raise TransientError(f"{where} gave no answer: {error.detail}; try again later") from None
        if not answer.get("choices"):
            raise TransientError(f"{where} gave no answer: JSON without choices; try again later")
        return answer


class _Chat(_Client, LocalChatCompletion):
    _parent = LocalChatCompletion

    def __init__(self, count: Count, **options: Any) -> None:
        super().__init__(**options)
        self._count, self.name = count, f"chat completions of {options['model']}"

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """A task may be written in Python, and want both: that shows only now."""
        raise _no_scores(sorted({request.task_name for request in requests}), "the chat API gives none of a given text")


class _Completions(_Client, LocalCompletionsAPI):
    _parent = LocalCompletionsAPI

    def __init__(self, count: Count, **options: Any) -> None:
        super().__init__(**options)
        self._count, self.name = count, f"completions of {options['model']}"
