"""Chat records, the one form of data between steps, and JSONL with line numbers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmops.errors import DataError, explain_os_errors

ROWS = "rows.jsonl"
"""Name of the file with the records in a dataset artifact's directory."""

TOP_LOGPROBS = "top_logprobs.jsonl"
"""Name of the file with the alternatives that an endpoint gave, a row's `id` and its `tokens` in a line."""

MAX_LINE_BYTES = 4 * 1024 * 1024
"""A longer line is taken for a broken file, not for a record."""


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class Provenance(BaseModel):
    """Who wrote what a model learns from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str
    """What the teacher says that it is."""
    method: Literal["answer", "self_instruct", "documents"]
    """`answer`: the last turn; `self_instruct`, `documents`: prompt and answer."""
    sources: tuple[str, ...] = ()
    """What the row was made from: ids of seed rows, or `document#first-last` with the passage's characters."""


class ChatRecord(BaseModel):
    """A conversation that ends with the assistant's turn, which is what a model learns and is judged by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    """First 16 hex digits of the SHA-256 of the canonical messages."""
    messages: tuple[Message, ...] = Field(min_length=2)
    stratum: str = ""
    """The group that the row was counted in when the data was split; reports show figures by it."""
    task: str = "chat"
    """Name of the task in `slmops.tasks`: how a teacher is asked, and when an answer is right."""
    provenance: Provenance | None = None
    """Where the answer comes from, or the whole row; None for a row as it was given."""

    @property
    def prompt(self) -> list[dict[str, str]]:
        """All turns before the last, in the form that a chat template takes."""
        return [message.model_dump() for message in self.messages[:-1]]

    @property
    def completion(self) -> str:
        """The assistant's last turn."""
        return self.messages[-1].content


def id_of(messages: Sequence[Message]) -> str:
    """The id of the record that these messages make."""
    canonical = json.dumps(
        [message.model_dump() for message in messages], ensure_ascii=False, sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line that is not blank.

    Raises:
        DataError: with file and line, if a line is too long, no UTF-8, no JSON or no object.
    """
    with explain_os_errors(path), open(path, "rb") as lines:
        number = 0
        while line := lines.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}:{number}: line is longer than {MAX_LINE_BYTES:,} bytes; is this a JSONL file?")
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not JSON ({error}); each line must be one JSON object") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            yield number, row


def write_jsonl(path: Path, rows: Iterable[BaseModel | dict[str, Any]]) -> int:
    """Write one object per line; return how many."""
    count = 0
    with explain_os_errors(path), open(path, "w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json_line(row))
            count += 1
    return count


def json_line(row: BaseModel | dict[str, Any]) -> str:
    """`row` as a line of JSONL."""
    data = row.model_dump(mode="json", exclude_none=True) if isinstance(row, BaseModel) else row
    return json.dumps(data, ensure_ascii=False) + "\n"


def concatenate(parts: Iterable[Path], path: Path) -> None:
    """Write the lines of `parts`, those that exist, one file after the other."""
    with explain_os_errors(path), open(path, "wb") as whole:
        for part in parts:
            if part.exists():
                with open(part, "rb") as lines:
                    shutil.copyfileobj(lines, whole)


def read_records(dataset: Path) -> list[ChatRecord]:
    """All records of a dataset artifact's directory.

    Raises:
        DataError: with file and line, if a row is no chat record or there is none.
    """
    return list(stream_records(dataset))


def stream_records(dataset: Path) -> Iterator[ChatRecord]:
    """`read_records`, one at a time."""
    path = dataset / ROWS
    found = False
    for number, row in read_jsonl(path):
        try:
            yield ChatRecord.model_validate(row)
            found = True
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{path}:{number}: not a chat record: {where}: {first['msg']}") from None
    if not found:
        raise DataError(f"{path} has no rows; give the step that wrote it more data, or a larger share of the split")
