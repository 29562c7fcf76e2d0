"""A model's chat template, rendered as transformers renders it and without transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import models
from slmops.errors import ModelError, explain_os_errors

if TYPE_CHECKING:
    from jinja2 import Template

MAX_TEMPLATE_BYTES = 1 << 20

Chat = Sequence[tuple[str, str]]
"""Role and content of each message."""


class RenderError(Exception):
    """The chat template refuses a conversation, or is not what it should be."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, rendered as transformers renders it."""

    compiled: Template
    special_tokens: dict[str, str]

    @classmethod
    def read(cls, directory: Path) -> ChatTemplate:
        """
        Raises:
            ModelError: there is none, or it is no template.
        """
        import jinja2

        settings = _read_settings(directory)
        file = directory / "chat_template.jinja"
        text = _read(file) if file.is_file() else settings.get("chat_template")
        if isinstance(text, list):  # named templates, of which the one for conversations counts
            text = next((entry["template"] for entry in text if entry.get("name") == "default"), None)
        if not isinstance(text, str) or not text:
            raise models.no_chat_template(directory)
        try:
            compiled = _environment().from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"the chat template of {directory} is no Jinja template: {error}; correct it") from None
        return cls(compiled, _special_tokens(settings))

    def render(self, chat: Chat, *, answer: bool = False, now: datetime | None = None) -> str:
        """The text of a conversation, with the beginning of an answer behind it if `answer`.

        Raises:
            RenderError: the template refuses it.
        """
        import jinja2

        moment = now or datetime.now()
        try:
            return self.compiled.render(
                messages=[{"role": role, "content": content} for role, content in chat],
                tools=None,
                documents=None,
                add_generation_prompt=answer,
                strftime_now=moment.strftime,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise RenderError(str(error).strip() or type(error).__name__) from None


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates, which come from anywhere: sandboxed."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what a model has said, for training; what is in it is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _read_settings(directory: Path) -> dict[str, Any]:
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON ({error}); save the tokenizer again") from None
    if not isinstance(settings, dict):
        raise ModelError(f"{file} is no JSON object; save the tokenizer again")
    return settings


def _read(file: Path) -> str:
    with explain_os_errors(file), open(file, encoding="utf-8") as opened:
        text = opened.read(MAX_TEMPLATE_BYTES + 1)
    if len(text) > MAX_TEMPLATE_BYTES:
        raise ModelError(f"{file} has more than {MAX_TEMPLATE_BYTES:,} characters; save the tokenizer again")
    return text


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Names such as `bos_token`, which templates use, and the tokens' texts."""
    found = {}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
