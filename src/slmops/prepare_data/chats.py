"""From a row's columns to the messages of a chat."""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slmops.errors import ConfigError
from slmops.prepare_data.config import PrepareDataConfig
from slmops.prepare_data.splitting import SPLITS, Split

Layout = Literal["messages", "sharegpt", "alpaca", "columns"]
Messages = tuple[tuple[str, str], ...]
"""(role, content) of each turn."""

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
TURN_COLUMNS: dict[Layout, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations", "messages"),
    "alpaca": (),
    "columns": (),
}
"""Columns that hold the turns of a chat, the usual one first."""
DEFAULT_TEMPLATES = tuple(
    PrepareDataConfig.model_fields[name].default for name in ("prompt_template", "completion_template")
)
MAX_SHOWN_COLUMNS = 20

_quote = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Chat:
    """What a row says."""

    messages: Messages
    own_prompt: str
    """What the row itself brings to the prompt: neither the template's words nor the system turn."""
    own_completion: str


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

    def values(self, columns: Mapping[str, Any]) -> list[str]:
        """The row's values, one for each pair of braces.

        Raises:
            BadRow: a column is absent or empty.
        """
        return [value_text(columns, column) for column in self.columns]

    def fill(self, values: Sequence[str]) -> str:
        """The text with these values."""
        rest = iter(values)
        return "".join(literal if column is None else literal + next(rest) for literal, column in self._parts)


@dataclass(frozen=True, slots=True)
class Recognised:
    """How rows become chats, and why so."""

    layout: Layout
    why: str


def recognise(config: PrepareDataConfig, first: Mapping[str, Any]) -> Recognised:
    """The layout that the Config names, or the one that the first row looks like."""
    if config.layout != "auto":
        return Recognised(config.layout, f"layout={config.layout}")
    if "messages" in first:
        if _looks_like_sharegpt(first["messages"]):
            return Recognised("sharegpt", "the first row has a column messages, whose turns have from and value")
        return Recognised("messages", "the first row has a column messages")
    if (config.prompt_template, config.completion_template) != DEFAULT_TEMPLATES:
        return Recognised("columns", "prompt_template and completion_template are given")
    if "conversations" in first:
        return Recognised("sharegpt", "the first row has a column conversations")
    if "instruction" in first and "output" in first:
        return Recognised("alpaca", "the first row has columns instruction and output")
    return Recognised("columns", "the first row has no column messages, conversations or instruction")


class ChatMaker:
    """Makes chats from rows of one layout.

    Args:
        show: Gives a column's name as it may be shown: without a header, a row of data stands in its place.

    Raises:
        ConfigError: a setting names a column that is not there.
    """

    def __init__(
        self,
        config: PrepareDataConfig,
        recognised: Recognised,
        columns: Collection[str],
        show: Callable[[str], str] = str,
    ) -> None:
        self.config, self.layout = config, recognised.layout
        self._prompt = self._completion = None
        if self.layout == "columns":
            self._prompt = Template("prompt_template", config.prompt_template)
            self._completion = Template("completion_template", config.completion_template)
        self._turns = next((name for name in TURN_COLUMNS[self.layout] if name in columns), "")
        self._check_columns(columns, show)

    def chat(self, columns: Mapping[str, Any]) -> Chat:
        """The row's chat, behind the system prompt.

        Raises:
            BadRow: the row makes none.
        """
        own: tuple[str, str] | None = None
        if self._prompt and self._completion:
            prompt, completion = self._prompt.values(columns), self._completion.values(columns)
            messages: Messages = (("user", self._prompt.fill(prompt)), ("assistant", self._completion.fill(completion)))
            own = "\n".join(prompt), "\n".join(completion)
        elif self.layout == "alpaca":
            messages = _read_alpaca(columns)
        elif self.layout == "sharegpt":
            messages = _behind_system(columns, _check_turns(_read_sharegpt(self._turns, columns.get(self._turns))))
        else:
            messages = _check_turns(_read_messages(columns.get("messages")))
        if own is None:
            turns = [content for role, content in messages[:-1] if role != "system"]
            own = "\n".join(turns), messages[-1][1]
        if self.config.system_prompt and messages[0][0] != "system":
            messages = (("system", self.config.system_prompt), *messages)
        return Chat(messages, *own)

    def stratum(self, columns: Mapping[str, Any], messages: Messages) -> str:
        """What the row is counted by; empty for nothing."""
        if self.config.stratify_by == "none":
            return ""
        if self.config.stratify_by == "completion":
            return messages[-1][1]
        return _value_or_nothing(columns, self.config.stratify_by)

    def group(self, columns: Mapping[str, Any]) -> str:
        """What the row must not be parted from; empty for nothing."""
        return "" if self.config.group_by == "none" else _value_or_nothing(columns, self.config.group_by)

    def task(self, columns: Mapping[str, Any]) -> str:
        """The task that the row's own column names, else the Config's."""
        return _value_or_nothing(columns, self.config.task_column) or self.config.task

    def split(self, columns: Mapping[str, Any]) -> Split | None:
        """The split that the row's own column names; None if no column decides.

        Raises:
            BadRow: it is none of the three.
        """
        if self.config.split_by != "column":
            return None
        found = columns.get(self.config.split_column)
        for split in SPLITS:
            if found == split:
                return split
        raise BadRow(f"column {self.config.split_column!r} must be train, validation or test, found {found!r:.600}")

    def roles(self) -> dict[str, str]:
        """What becomes of which column."""
        if self._prompt and self._completion:
            return dict.fromkeys(self._completion.columns, "completion") | dict.fromkeys(self._prompt.columns, "prompt")
        if self.layout == "alpaca":
            return {"instruction": "prompt", "input": "prompt", "output": "completion"}
        return {self._turns or "messages": "turns"}

    def _check_columns(self, columns: Collection[str], show: Callable[[str], str]) -> None:
        wanted = [(template.setting, column) for template in (self._prompt, self._completion) if template
                  for column in template.columns]  # fmt: skip
        if self.layout == "alpaca":
            wanted += [("layout=alpaca", "instruction"), ("layout=alpaca", "output")]
        elif self.layout != "columns" and not self._turns:
            wanted.append((f"layout={self.layout}", TURN_COLUMNS[self.layout][0]))
        if self.config.split_by == "column":
            wanted.append(("split_column", self.config.split_column))
        if self.config.stratify_by not in ("completion", "none"):
            wanted.append(("stratify_by", self.config.stratify_by))
        if self.config.group_by != "none":
            wanted.append(("group_by", self.config.group_by))
        missing = [f"{setting} names column {column!r}" for setting, column in wanted if column not in columns]
        if missing:
            found = ", ".join(repr(show(name)) for name in list(columns)[:MAX_SHOWN_COLUMNS]) or "none"
            more = f" and {len(columns) - MAX_SHOWN_COLUMNS:,} more" if len(columns) > MAX_SHOWN_COLUMNS else ""
            raise ConfigError(
                f"{'; '.join(missing)}, but {self.config.source_uri} has the columns {found}{more}; correct the setting"
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


def ids_of(messages: Messages) -> tuple[str, str]:
    """Ids of a chat and of its prompt: 16 hex digits of the SHA-256 of the messages' canonical JSON.

    Canonical is what `json.dumps(messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"))` gives.
    """
    turns = [f'{{"content":{_quote(content)},"role":"{role}"}}' for role, content in messages]
    return _digest(turns), _digest(turns[:-1])


def as_dicts(messages: Messages) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def _digest(turns: Sequence[str]) -> str:
    return hashlib.sha256(f"[{','.join(turns)}]".encode()).hexdigest()[:16]


def _value_or_nothing(columns: Mapping[str, Any], column: str) -> str:
    try:
        return value_text(columns, column)
    except BadRow:
        return ""


def _looks_like_sharegpt(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "from" in turns[0]


def _read_alpaca(columns: Mapping[str, Any]) -> Messages:
    """Instruction, and the input below it where there is one (Taori et al. 2023)."""
    prompt = value_text(columns, "instruction")
    if given := _value_or_nothing(columns, "input"):
        prompt = f"{prompt}\n\n{given}"
    return _behind_system(columns, (("user", prompt), ("assistant", value_text(columns, "output"))))


def _behind_system(columns: Mapping[str, Any], messages: Messages) -> Messages:
    """The messages behind the row's own column `system`, which some data sets have."""
    system = _value_or_nothing(columns, "system")
    return (("system", system), *messages) if system and messages[0][0] != "system" else messages


def _read_sharegpt(column: str, value: Any) -> Messages:
    messages = []
    for index, turn in enumerate(_list(column, value)):
        if not isinstance(turn, Mapping):
            raise BadRow(f"{column}[{index}] must be an object, found {type(turn).__name__}")
        speaker, content = turn.get("from"), turn.get("value")
        if speaker not in SHAREGPT_ROLES:
            raise BadRow(f"{column}[{index}].from must be one of {', '.join(SHAREGPT_ROLES)}, found {speaker!r:.600}")
        if not isinstance(content, str) or not content.strip():
            raise BadRow(f"{column}[{index}].value is empty or no text")
        messages.append((SHAREGPT_ROLES[speaker], _check_text(content, f"{column}[{index}].value")))
    return tuple(messages)


def _list(column: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise BadRow(f"{column} must be a list, found {type(value).__name__}")
    return value


def _read_messages(value: Any) -> Messages:
    return tuple(_read_message(index, message) for index, message in enumerate(_list("messages", value)))


def _check_turns(messages: Messages) -> Messages:
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
        raise BadRow(f"messages[{index}].role must be system, user or assistant, found {role!r:.600}")
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
