"""Conversations as token ids and back, without transformers: a model's own tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from slmops import models
from slmops.errors import DataError, ModelError, explain_os_errors

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"


class Conversation:
    """The tokenizer and chat template of a directory as `save_pretrained` writes them."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            ArtifactError: a file is missing.
            ModelError: a file is damaged.
        """
        self._tokenizer = _read_tokenizer(directory / TOKENIZER)
        self._special_tokens = _read_special_tokens(directory / TOKENIZER_CONFIG)
        self._template = _read_template(directory)

    def render(self, messages: Sequence[dict[str, str]], *, to_answer: bool) -> str:
        """A conversation as text; with `to_answer`, up to where the assistant's next turn begins.

        Raises:
            DataError: the template refuses the conversation, as some do with a system turn.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=to_answer,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the model's chat template refuses the conversation: {error}") from None

    def encode_messages(self, messages: Sequence[dict[str, str]], *, to_answer: bool) -> list[int]:
        """Token ids of `render`. Special tokens come from the template alone."""
        return self.encode(self.render(messages, to_answer=to_answer))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with nothing added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class _Generation(Extension):
    """{% generation %} marks what a model has said, for training; what is in it is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _read_tokenizer(file: Path) -> Tokenizer:
    with explain_os_errors(file):
        text = file.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{file} is no tokenizer ({str(error)[:200]}); save the model's tokenizer again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_special_tokens(file: Path) -> dict[str, str]:
    """Names such as `bos_token`, which templates use, and the tokens' texts."""
    with explain_os_errors(file):
        text = file.read_text(encoding="utf-8")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON ({error}); save the model's tokenizer again") from None
    if not isinstance(settings, dict):
        raise ModelError(f"{file} is no JSON object; save the model's tokenizer again")
    found = {}
    for name, value in settings.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            found[name] = token
    return found


def _read_template(directory: Path) -> jinja2.Template:
    file = directory / TEMPLATE
    if not file.is_file():
        raise models.no_chat_template(directory)
    with explain_os_errors(file):
        text = file.read_text(encoding="utf-8")
    try:
        return _environment().from_string(text)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ModelError(f"{file} is no Jinja template: {error}; correct it") from None


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates, which come from anywhere: sandboxed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
