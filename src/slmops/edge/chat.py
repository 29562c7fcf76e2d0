"""A chat completion request, read strictly: what is served is honoured, what cannot be honoured is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields of OpenAI's API that change no answer here. They are accepted and not looked at."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "function_call": ("none", None),
    "functions": ([], None),
    "logit_bias": ({}, None),
    "logprobs": (False, None),
    "modalities": (["text"], None),
    "n": (1, None),
    "presence_penalty": (0, None),
    "response_format": ({"type": "text"}, None),
    "tool_choice": ("none", "auto", None),
    "tools": ([], None),
    "top_logprobs": (0, None),
}
"""Fields that would change the answer and are not served, and the values that ask for nothing."""

MAX_MESSAGES = 1024
MAX_STOPS = 4
DEFAULT_MAX_TOKENS = 512


class InvalidRequestError(Exception):
    """A request that cannot be served; becomes OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class _Turn(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = False


class ChatRequest(BaseModel):
    """The fields of OpenAI's `POST /v1/chat/completions` that are served."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str
    messages: list[_Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 31)
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] | None = Field(default=None, max_length=MAX_STOPS)
    stream: bool | None = False
    stream_options: _StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise ValueError("the last message must not be the assistant's")
        return self

    @property
    def chat(self) -> list[dict[str, str]]:
        """The turns as a chat template takes them."""
        return [
            {"role": "system" if turn.role == "developer" else turn.role, "content": turn.text}
            for turn in self.messages
        ]

    @property
    def token_limit(self) -> int:
        """Longest answer in tokens. Bounded by default, as memory for all of it is taken at the start."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def parse_request(body: Any) -> ChatRequest:
    """Read the JSON body of a request.

    Raises:
        InvalidRequestError: naming the field that is wrong.
    """
    if not isinstance(body, dict):
        raise InvalidRequestError("the body must be a JSON object")
    fields = {}
    for name, value in body.items():
        if name in IGNORED:
            continue
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise InvalidRequestError(f"{name} is not supported here; leave it out", name)
            continue
        fields[name] = value
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or None
        message = problem["msg"].removeprefix("Value error, ")
        raise InvalidRequestError(f"{where}: {message}" if where else message, where) from None


class StopStrings:
    """Cuts a growing text at the first stop string, and holds back what may become one."""

    def __init__(self, stops: list[str] | None) -> None:
        self._stops = stops or []
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What of the text so far can be sent now."""
        self._held += text
        ends = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            ready, self._held = self._held[: min(ends)], ""
            return ready
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def rest(self) -> str:
        """What was held back when the text has ended."""
        ready, self._held = self._held, ""
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
