"""OpenAI's API as its many servers speak it: what to send, and what came back.

Tried with llama-cpp-python 0.3.36 and slmops' own edge server. What vLLM, OpenAI and others do differently is from
their documentation and issue trackers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from slmops.errors import UserError
from slmops.teachers.interface import STOP, Answer, Decoding, Prompt, Question

Api = Literal["chat", "completions"]
PATHS: Mapping[Api, str] = {"chat": "chat/completions", "completions": "completions"}
TOO_LONG = re.compile(r"context[ _](length|window|size)|max_model_len|prompt is too long|maximum input length", re.I)
FILTERED = re.compile(r"content[ _](filter|management|policy)", re.I)
SURROGATE = re.compile("[\ud800-\udfff]")
MAX_SEED = (1 << 31) - 1
"""Some servers take no larger one."""


class Unusable(Exception):
    """An attempt that gave no answer; another may."""

    def __init__(
        self, reason: str, detail: str, *, after_s: float | None = None, max_retries: int = 1000, usage: Usage = (0, 0)
    ) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.after_s, self.max_retries, self.usage = (
            reason,
            detail,
            after_s,
            max_retries,
            usage,
        )


Usage = tuple[int, int]
"""Tokens of prompt and answer; zeros if the server does not say."""


EXTRAS = {"repeat_penalty": 1.0, "repetition_penalty": 1.0}
"""Without them llama-cpp-python's greedy answer is not the likeliest one (it punishes by 1.1 what was said before), nor
is vLLM's for models whose generation_config.json sets a penalty."""
SAMPLING_EXTRAS = {"top_k": 0, "min_p": 0.0}
"""Without them llama.cpp samples from the 40 likeliest tokens that have at least a twentieth of the best one's odds."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """Which of the optional parameters a server takes; found out by what it refuses."""

    limits: tuple[str, ...] = ("max_completion_tokens", "max_tokens")
    """llama-cpp-python and older servers pass over `max_completion_tokens` without a word and write on and on; OpenAI
    refuses `max_tokens` for its reasoning models, and both together for all. So both are sent until one is refused."""
    seed: bool = True
    top_p: bool = True
    extras: bool = True
    """Parameters beyond OpenAI's that switch off what servers do to the odds by themselves, see `EXTRAS`."""

    def without(self, words: str, decoding: Decoding) -> Dialect | None:
        """How to ask after a refusal in these `words`, or None if nothing can be left out."""
        if re.search(r"\bmax_(completion_)?tokens\b", words):
            left = {2: self.limits[:1], 1: ("max_tokens",)}[len(self.limits)]
            return replace(self, limits=left) if left != self.limits else None
        if self.extras and any(re.search(rf"\b{name}\b", words) for name in (EXTRAS | SAMPLING_EXTRAS)):
            return replace(self, extras=False)
        if self.seed and not decoding.greedy and re.search(r"\bseed\b", words):
            return replace(self, seed=False)
        if self.top_p and (decoding.greedy or decoding.top_p == 1.0) and re.search(r"\btop_p\b", words):
            return replace(self, top_p=False)
        return None


def request_body(question: Question, decoding: Decoding, model: str, api: Api, dialect: Dialect) -> bytes:
    """The body of a request."""
    body: dict[str, Any] = {"model": model}
    if api == "chat":
        body["messages"] = [{"role": turn["role"], "content": turn["content"]} for turn in question.messages]
        body |= dict.fromkeys(dialect.limits, decoding.max_new_tokens)
        if decoding.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": decoding.top_logprobs}
    else:
        body |= {"prompt": plain_text(question.messages), "max_tokens": decoding.max_new_tokens}
        if decoding.top_logprobs:
            body["logprobs"] = decoding.top_logprobs
    body["temperature"] = 0.0 if decoding.greedy else decoding.temperature
    if dialect.top_p:
        body["top_p"] = 1.0 if decoding.greedy else decoding.top_p
    if dialect.seed and not decoding.greedy:
        body["seed"] = question.seed & MAX_SEED
    if dialect.extras:
        body |= EXTRAS if decoding.greedy else EXTRAS | SAMPLING_EXTRAS
    return json.dumps(body).encode()


def plain_text(messages: Prompt) -> str:
    """The turns one after the other, a blank line between them: no markup that a base model would have to know."""
    return "\n\n".join(turn["content"] for turn in messages)


def max_answer_bytes(decoding: Decoding) -> int:
    """More than any honest answer takes: a token has at most some dozens of characters, six bytes each in JSON."""
    per_token = 256 + (256 * (decoding.top_logprobs + 1) if decoding.top_logprobs else 0)
    return 1024 * 1024 + decoding.max_new_tokens * per_token


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object of a response.

    Raises:
        Unusable: it is none.
    """
    try:
        payload = json.loads(data)
    except (ValueError, RecursionError):
        raise Unusable("not_json", f"{len(data):,} bytes that are not JSON") from None
    if not isinstance(payload, dict):
        raise Unusable("wrong_shape", f"JSON {type(payload).__name__}, not an object")
    return payload


def read_answer(payload: Mapping[str, Any], api: Api) -> Answer:
    """The answer of a response.

    Raises:
        Unusable: it holds none, or an empty one.
    """
    choices = payload.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        if payload.get("error"):
            raise Unusable("server_error", "an error in place of an answer")
        raise Unusable("wrong_shape", "JSON without choices")
    choice = choices[0]
    finish_reason, model = choice.get("finish_reason"), payload.get("model")
    text = _chat_text(choice) if api == "chat" else choice.get("text")
    if not isinstance(text, str) or not isinstance(finish_reason, str):
        raise Unusable("wrong_shape", "a choice without text or finish_reason")
    if SURROGATE.search(text):
        raise Unusable("wrong_shape", "text that is not Unicode")
    usage = read_usage(payload)
    said = without_thinking(text)
    if not said and finish_reason == STOP:
        # Asked once more, as it is paid for and a greedy answer will hardly change.
        raise Unusable("empty", "an empty answer", max_retries=1, usage=usage)
    # With the thinking cut off, they would belong to another text.
    logprobs = choice.get("logprobs") if said == text else None
    try:
        top_logprobs = (_chat_logprobs if api == "chat" else _completion_logprobs)(logprobs or {})
    except (AttributeError, TypeError):
        raise Unusable("wrong_shape", "logprobs of an unknown form") from None
    return Answer(
        text=said,
        finish_reason=finish_reason,
        model=model if isinstance(model, str) else "",
        num_prompt_tokens=usage[0],
        num_tokens=usage[1],
        top_logprobs=top_logprobs,
    )


def read_usage(payload: Mapping[str, Any]) -> Usage:
    """What the server says that was used."""
    usage = payload.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    prompt, answer = (count if type(count) is int and 0 < count < 1 << 40 else 0 for count in counts)
    return prompt, answer


def without_thinking(text: str) -> str:
    """The answer after what a reasoning model thought aloud.

    Servers that know the model put its thoughts into `reasoning_content`, which is not looked at. Others leave
    `<think>…</think>` in front of the answer, or only its end where the template has opened it.
    """
    if text.lstrip().startswith("<think>"):
        return text.partition("</think>")[2].lstrip()
    before, end, after = text.partition("</think>")
    return after.lstrip() if end and "<think>" not in before else text


def same_model(asked: str, served: str) -> bool:
    """Whether `served` is what was asked for, perhaps with a version behind it or another path before it."""
    pairs = ((asked, served), (asked.rpartition("/")[2], served.rpartition("/")[2]))
    return any(re.match(re.escape(wanted) + r"(?![a-z0-9]|\.[0-9])", found, re.I) for wanted, found in pairs)


def single_model(payload: Mapping[str, Any]) -> str | None:
    """The name of the only model that a server lists; None if it lists none.

    Raises:
        UserError: there are several.
    """
    listed = payload.get("data")
    names = (
        [m["id"] for m in listed if isinstance(m, dict) and isinstance(m.get("id"), str)]
        if isinstance(listed, list)
        else []
    )
    if len(names) > 1:
        raise UserError(f"it serves {len(names)} models; set endpoint_model to one of {', '.join(names[:10])}")
    return names[0] if names else None


def words_of_error(data: bytes) -> str:
    """What a server says about a refusal: code, parameter and message; never the `input` that some send back."""
    try:
        payload = json.loads(data)
    except (ValueError, RecursionError):
        return data[:500].decode(errors="replace")
    if not isinstance(payload, dict):
        return ""
    error = payload.get("error", payload)
    if isinstance(error, str):
        return error
    if not isinstance(error, dict):
        return ""
    parts = [error.get(name) for name in ("code", "type", "param", "message")]
    for problem in payload["detail"] if isinstance(payload.get("detail"), list) else [payload.get("detail")]:
        # FastAPI's form
        parts += [problem.get("loc"), problem.get("msg")] if isinstance(problem, dict) else [problem]
    return " ".join(str(part) for part in parts if part)


def _chat_text(choice: Mapping[str, Any]) -> Any:
    message = choice.get("message")
    if not isinstance(message, dict):
        return None
    content = message.get("content")
    # A refusal has a field of its own at OpenAI; an answer that is all thought, or a call of a tool, has no content.
    return content if content is not None else message.get("refusal") or ""


def _chat_logprobs(logprobs: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        {
            "token": token.get("token"),
            "logprob": token.get("logprob"),
            "top_logprobs": [
                {"token": top.get("token"), "logprob": top.get("logprob")} for top in token.get("top_logprobs") or ()
            ],
        }
        for token in logprobs.get("content") or ()
    )


def _completion_logprobs(logprobs: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The older form, parallel lists, as the one of chat."""
    columns: list[Sequence[Any]] = [logprobs.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs")]
    return tuple(
        {
            "token": token,
            "logprob": logprob,
            "top_logprobs": [{"token": text, "logprob": value} for text, value in (top or {}).items()],
        }
        for token, logprob, top in zip(*columns, strict=False)
    )
