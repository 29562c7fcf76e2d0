"""Rows of JSONL, CSV and Parquet files, one at a time, each with the line it begins on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, AnyStr

from slmops.errors import ConfigError, DataError, explain_os_errors
from slmops.progress import Progress
from slmops.records import MAX_LINE_BYTES

PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source file, readable or not."""

    line: int
    """Line of the file where the row begins, from 1; in Parquet the number of the row."""
    columns: dict[str, Any]
    problem: str = ""
    """Why it cannot be read; empty if it can."""


def reader_of(source_uri: str) -> Callable[[Path], Iterator[Row]]:
    """The reader for the ending of `source_uri`.

    Raises:
        ConfigError: there is none.
    """
    ending = Path(source_uri).suffix.lower()
    if ending not in READERS:
        raise ConfigError(f"source_uri must end in {', '.join(READERS)}, got {source_uri!r}; convert the file first")
    return READERS[ending]


def read_jsonl(path: Path) -> Iterator[Row]:
    """Objects, one per line; blank lines are skipped."""
    with explain_os_errors(path), open(path, "rb") as file, _reading(path) as progress:
        for number, line in enumerate(_lines(path, file, progress), 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield _parse(number, text)


def read_csv(path: Path) -> Iterator[Row]:
    """Rows below a header line, separated by commas, quoted as in RFC 4180.

    Raises:
        DataError: the header is unusable, or a quote is never closed.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
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
                if "unexpected end of data" in str(error):
                    raise DataError(
                        f"{path}:{begins}: the row that begins here has a quote that is never closed"
                    ) from None
                yield Row(begins, {}, f"not CSV: {error}")
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
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(number, columns)
                    progress.advance()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet after row {number}: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def _parse(number: int, line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(number, {}, f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"not JSON: {error}")
    if not isinstance(row, dict):
        return Row(number, {}, f"expected a JSON object, found {type(row).__name__}")
    return Row(number, row)


def _lines(path: Path, file: IO[AnyStr], progress: Progress) -> Iterator[AnyStr]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise _line_too_long(path, number)
        progress.advance(len(line))
        yield line


def _header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next((values for values in reader if values), [])
    except csv.Error as error:
        raise DataError(f"{path}:1: the header is not CSV: {error}") from None
    doubled = {name for name in header if header.count(name) > 1}
    if doubled:
        raise DataError(f"{path}:1: the header names {sorted(doubled)} more than once; give each column its own name")
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
