"""Rows of JSONL, JSON, CSV, Parquet and Arrow files, one at a time, each with the line it begins on."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, AnyStr

from slmops.errors import DataError, explain_os_errors
from slmops.progress import Progress
from slmops.records import MAX_LINE_BYTES
from slmops.redaction import Redactor

BATCH_BYTES = 8 * 1024 * 1024
"""Of a Parquet file, so much is decoded at once, as far as its row groups' sizes tell."""
MAX_BATCH_ROWS = 1024
MAX_COLUMNS = 10_000
"""A row with more columns is taken for a broken file."""
PIECE_CHARS = 1024 * 1024

_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_WHITESPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source file, readable or not."""

    line: int
    """Line of the file where the row begins, from 1; in Parquet and Arrow files the number of the row."""
    columns: dict[str, Any]
    problem: str = ""
    """Why it cannot be read; empty if it can."""


def read_jsonl(path: Path) -> Iterator[Row]:
    """Objects, one per line; blank lines are skipped.

    Raises:
        DataError: a line is too long, or the file is UTF-16.
    """
    with explain_os_errors(path), open(path, "rb") as file, _reading(path) as progress:
        for number, line in enumerate(_lines(path, file, progress), 1):
            if number == 1:
                _refuse_wide(path, line)
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _parse(number, line)


def read_json(path: Path) -> Iterator[Row]:
    """Objects of one array, read piece by piece.

    Raises:
        DataError: it is no array, or breaks off; what follows a broken object cannot be found.
    """
    decoder, line, buffer, ended = json.JSONDecoder(), 1, "", False
    with explain_os_errors(path), open(path, "rb") as file, _reading(path) as progress:
        _refuse_wide(path, file.peek(2))
        text = _decoded(path, file, progress)
        separator = "["
        while True:
            buffer, line = _skip_space(buffer, line)
            if not buffer and not ended:
                buffer, ended = next(text, ("", True))
                continue
            if buffer.startswith("]") and separator == ",":
                return
            if buffer.startswith(separator):
                buffer, line = _skip_space(buffer[1:], line)
                if separator == "[" and buffer.startswith("]"):
                    return
            elif separator == "[" or buffer:
                raise DataError(
                    f"{path}:{line}: expected {separator!r}; a .json file must hold one array of objects, and one "
                    "object per line needs the ending .jsonl"
                )
            while True:
                try:
                    value, end = decoder.raw_decode(buffer)
                    if end < len(buffer) or ended:  # a number at the end of a piece may go on in the next
                        break
                except (ValueError, RecursionError) as error:
                    if ended or len(buffer) > MAX_LINE_BYTES:
                        raise DataError(f"{path}:{line}: not JSON: {_why(error)} of the row that begins here") from None
                more, ended = next(text, ("", True))
                buffer, line = _skip_space(buffer + more, line)
            yield _checked(line, value)
            line += buffer.count("\n", 0, end)
            buffer, separator = buffer[end:], ","


def read_csv(path: Path) -> Iterator[Row]:
    """Rows below a header line, separated by commas, quoted as in RFC 4180.

    Raises:
        DataError: the header is unusable, or a quote is never closed.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    with explain_os_errors(path), open(path, "rb") as raw:
        _refuse_wide(path, raw.read(2))
    # Bytes that are no UTF-8 become surrogates, which are found row by row, so one of them spoils one row only.
    with (
        explain_os_errors(path),
        open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        _reading(path) as progress,
    ):
        reader = csv.reader(_lines(path, file, progress), strict=True)
        header = _header(path, reader)
        while True:
            begins = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error) or "field larger than" in str(error):
                    raise DataError(
                        f"{path}:{begins}: the row that begins here has a quote that is never closed, or a cell of "
                        f"more than {MAX_LINE_BYTES:,} characters"
                    ) from None
                yield Row(begins, {}, f"not CSV: {error} (in line {reader.line_num})")
                continue
            if values:
                yield _match(begins, header, values)


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows by number, in batches.

    Raises:
        DataError: it is no Parquet file, or a damaged one.
    """
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file, Progress(f"reading {path.name}", file.metadata.num_rows) as progress:
            _refuse_many_columns(path, len(file.schema_arrow.names))
            for group in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(group)
                row_bytes = about.total_byte_size // max(1, about.num_rows)
                batch_size = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))
                for batch in file.iter_batches(batch_size=batch_size, row_groups=[group]):
                    for columns in batch.to_pylist():
                        number += 1
                        yield Row(number, columns)
                        progress.advance()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet after row {number}: {error}") from None


def read_arrow(path: Path) -> Iterator[Row]:
    """Rows by number of an Arrow stream, which is what `datasets` saves.

    Raises:
        DataError: it is no such file, or a damaged one.
    """
    import pyarrow
    from pyarrow import ipc

    number = 0
    try:
        with pyarrow.OSFile(str(path)) as file, ipc.open_stream(file) as batches:
            _refuse_many_columns(path, len(batches.schema.names))
            for batch in batches:
                for start in range(0, batch.num_rows, MAX_BATCH_ROWS):
                    for columns in batch.slice(start, MAX_BATCH_ROWS).to_pylist():
                        number += 1
                        yield Row(number, columns)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as an Arrow stream after row {number}: {error}") from None


Reader = Callable[[Path], Iterator[Row]]

READERS: dict[str, tuple[str, Reader]] = {
    ".jsonl": ("JSONL", read_jsonl),
    ".json": ("a JSON array", read_json),
    ".csv": ("CSV", read_csv),
    ".parquet": ("Parquet", read_parquet),
}
"""Name and reader of a format by the ending of its files."""


def _parse(number: int, line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(number, {}, f"not UTF-8: {error.reason} at byte {error.start + 1} of the line")
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"not JSON: {_why(error)}")
    return _checked(number, row)


def _checked(line: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(line, {}, f"expected a JSON object, found {type(value).__name__}")
    if len(value) > MAX_COLUMNS:
        return Row(line, {}, f"has {len(value):,} columns, more than {MAX_COLUMNS:,}")
    return Row(line, value)


def _why(error: Exception) -> str:
    """What is wrong with JSON, and in which column of the line; never the text itself."""
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _lines(path: Path, file: IO[AnyStr], progress: Progress) -> Iterator[AnyStr]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise _line_too_long(path, number)
        progress.advance(len(line))
        yield line


def _decoded(path: Path, file: IO[bytes], progress: Progress) -> Iterator[tuple[str, bool]]:
    """Pieces of a text file, each with whether it is the last."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while True:
        piece = file.read(PIECE_CHARS)
        progress.advance(len(piece))
        try:
            yield decoder.decode(piece, not piece), not piece
        except UnicodeDecodeError as error:
            at = progress.done - len(piece) + error.start
            raise DataError(f"{path}: not UTF-8: {error.reason} near byte {at:,}; convert the file") from None
        if not piece:
            return


def _skip_space(buffer: str, line: int) -> tuple[str, int]:
    rest = buffer.lstrip(_WHITESPACE)
    return rest, line + buffer.count("\n", 0, len(buffer) - len(rest))


def _header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next((values for values in reader if values), [])
    except csv.Error as error:
        raise DataError(f"{path}:1: the header is not CSV: {error}") from None
    _refuse_many_columns(path, len(header))
    doubled = sorted(name for name, count in Counter(header).items() if count > 1)
    if doubled:
        # Without a header, the first row of data stands in its place.
        shown = Redactor().redact(str(doubled[:10]))[0]
        raise DataError(f"{path}:1: the header names {shown} more than once; give each column its own name")
    return header


def _match(line: int, header: list[str], values: list[str]) -> Row:
    columns = dict(zip(header, values, strict=False))
    problem = "" if len(values) == len(header) else f"{len(values)} fields where the header has {len(header)}"
    return Row(line, columns, problem)


def _reading(path: Path) -> Progress:
    return Progress(f"reading {path.name}", path.stat().st_size, "bytes")


def _line_too_long(path: Path, number: int) -> DataError:
    return DataError(
        f"{path}:{number}: line is longer than {MAX_LINE_BYTES:,} bytes; is this a {path.suffix.lower()} file?"
    )


def _refuse_wide(path: Path, beginning: bytes) -> None:
    if encoding := _WIDE_BOMS.get(beginning[:2]):
        raise DataError(f"{path} is {encoding}; convert it to UTF-8, for instance with `iconv -f {encoding} -t UTF-8`")


def _refuse_many_columns(path: Path, num_columns: int) -> None:
    if num_columns > MAX_COLUMNS:
        raise DataError(
            f"{path}: has {num_columns:,} columns, more than {MAX_COLUMNS:,}; is it the right file, and not transposed?"
        )
