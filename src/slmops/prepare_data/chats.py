"""From a row's columns to the messages of a chat."""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from slmops.errors import ConfigError
from slmops.prepare_data.config import PrepareDataConfig
from slmops.progress import log

Messages = tuple[tuple[str, str], ...]
"""(role, content) of each turn."""

ROLES = ("system", "user", "assistant")


class BadRow(Exception):
    """A row that makes no chat; the message is the reason."""


class Template:
    """Text with column names in braces. `{{` and `}}` are braces; nothing but a column's name may stand in braces.

    Raises:
        ConfigError: the text is no such template.
    """

    def __init__(self, setting: str, text: str) -> None:
        self.setting = setting
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"{setting}: {error}, got {text!r}; write {{{{ and }}}} for braces that are text"
            ) from None
        for _, column, form, conversion in parts:
            if column is not None and (not column or form or conversion):
                raise ConfigError(f"{setting}: braces must hold a column's name and nothing else, got {text!r}")
        self._parts = [(literal, column) for literal, column, _, _ in parts]
        self.columns = [column for _, column in self._parts if column is not None]
        if not self.columns:
            raise ConfigError(f"{setting}: names no column, so all rows would be alike, got {text!r}")

    def fill(self, columns: Mapping[str, Any]) -> str:
        """The text with the row's values.

        Raises:
            BadRow: a column is absent or empty.
        """
        return "".join(
            literal + (value_text(columns, column) if column is not None else "") for literal, column in self._parts
        )


class ChatMaker:
    """Makes messages from rows of one layout, which the first row decides if the Config leaves it open."""

    def __init__(self, config: PrepareDataConfig, first: Mapping[str, Any]) -> None:
        self.config = config
        self.layout = config.layout
        if config.layout == "auto":
            self.layout = "messages" if "messages" in first else "columns"
            log.info(
                "layout %s, because the first row has %s column messages",
                self.layout,
                "a" if "messages" in first else "no",
            )
        self._prompt = self._completion = None
        if self.layout == "columns":
            self._prompt = Template("prompt_template", config.prompt_template)
            self._completion = Template("completion_template", config.completion_template)
        self._check_columns(first)

    def messages(self, columns: Mapping[str, Any]) -> Messages:
        """The row's chat, behind the system prompt.

        Raises:
            BadRow: the row makes none.
        """
        if self._prompt and self._completion:
            messages: Messages = (("user", self._prompt.fill(columns)), ("assistant", self._completion.fill(columns)))
        else:
            messages = _read_messages(columns.get("messages"))
        if self.config.system_prompt and messages[0][0] != "system":
            messages = (("system", self.config.system_prompt), *messages)
        return messages

    def stratum(self, columns: Mapping[str, Any], messages: Messages) -> str:
        """The group that the row is counted in; empty for none."""
        if self.config.stratify_by == "none":
            return ""
        if self.config.stratify_by == "completion":
            return messages[-1][1]
        try:
            return value_text(columns, self.config.stratify_by)
        except BadRow:
            return ""

    def split(self, columns: Mapping[str, Any]) -> str:
        """The split that the row's own column names; empty if the seed decides.

        Raises:
            BadRow: it is none of the three.
        """
        if self.config.split_by == "seed":
            return ""
        found = columns.get(self.config.split_column)
        if found not in ("train", "validation", "test"):
            raise BadRow(f"column {self.config.split_column!r} must be train, validation or test, found {found!r:.60}")
        return str(found)

    def _check_columns(self, first: Mapping[str, Any]) -> None:
        wanted = [(template.setting, column) for template in (self._prompt, self._completion) if template
                  for column in template.columns]  # fmt: skip
        if self.layout == "messages":
            wanted.append(("layout=messages", "messages"))
        if self.config.split_by == "column":
            wanted.append(("split_column", self.config.split_column))
        if self.config.stratify_by not in ("completion", "none"):
            wanted.append(("stratify_by", self.config.stratify_by))
        missing = [f"{setting} names column {column!r}" for setting, column in wanted if column not in first]
        if missing:
            found = ", ".join(map(repr, first)) or "none"
            raise ConfigError(
                f"{'; '.join(missing)}, but {self.config.source_uri} has the columns {found}; correct the setting"
            )


def value_text(columns: Mapping[str, Any], column: str) -> str:
    """A value as text: numbers and dates in their usual form, lists and objects as JSON.

    Raises:
        BadRow: it is absent, empty or binary.
    """
    if column not in columns:
        raise BadRow(f"no column {column!r}")
    value = columns[column]
    if (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    ):
        raise BadRow(f"column {column!r} is empty")
    if isinstance(value, bytes):
        raise BadRow(f"column {column!r} holds binary data")
    if isinstance(value, bool | list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return _check_text(str(value), f"column {column!r}")


def digest_of_messages(messages: Messages) -> str:
    """First 16 hex digits of the SHA-256 of the messages' canonical JSON: the id of a chat, or of its prompt."""
    canonical = json.dumps(as_dicts(messages), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def as_dicts(messages: Messages) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def _read_messages(value: Any) -> Messages:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise BadRow(f"messages must be a list, found {type(value).__name__}")
    messages = tuple(_read_message(index, message) for index, message in enumerate(value))
    roles = [role for role, _ in messages]
    if "system" in roles[1:]:
        raise BadRow("a system message must be the first one")
    if "user" not in roles or roles[-1] != "assistant":
        raise BadRow("messages must have a user's turn and end with the assistant's")
    return messages


def _read_message(index: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise BadRow(f"messages[{index}] must be an object, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRow(f"messages[{index}].role must be system, user or assistant, found {role!r:.40}")
    if not isinstance(content, str) or not content.strip():
        raise BadRow(f"messages[{index}].content is empty or no text")
    # Parquet gives every message all keys, with null where a message has none.
    extra = sorted(key for key in message if key not in ("role", "content") and message[key] is not None)
    if extra:
        raise BadRow(f"messages[{index}] has {', '.join(extra)}, which a chat record cannot hold")
    return str(role), _check_text(content, f"messages[{index}].content")


def _check_text(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{what} is not UTF-8") from None
    return text
