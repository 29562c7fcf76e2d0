"""Documents, and the passages they are cut into."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slmops.errors import DataError, explain_os_errors
from slmops.records import read_jsonl

ENDINGS = (".txt", ".md", ".jsonl")
MAX_FILE_BYTES = 64 * 1024 * 1024
"""A longer text file is no document; put several into a .jsonl file, which has no such limit."""

_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+|\n|(?<=[。！？；])")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Document:
    """One text with the name that rows made from it give as their source."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document."""

    document: str
    first: int
    """Its first character in the document's text, from 0."""
    end: int
    """The first character behind it."""
    text: str

    @property
    def source(self) -> str:
        """`document#first-last`, last character included."""
        return f"{self.document}#{self.first}-{self.end - 1}"


def read_documents(path: Path, text_field: str) -> Iterator[Document]:
    """The documents of a file, or of all files below a folder that can be read, by name.

    Raises:
        ArtifactError: there is no such path.
        DataError: there is no document, or one is no UTF-8, too long or has no text.
    """
    with explain_os_errors(path):
        path.stat()
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS) if path.is_dir() else [path]
    if not files or not all(file.suffix.lower() in ENDINGS for file in files):
        raise DataError(f"{path} holds no documents; they end in {', '.join(ENDINGS)}: convert the files first")
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        if file.suffix.lower() == ".jsonl":
            yield from _rows(file, name, text_field)
        else:
            yield Document(name, _text(file))


def passages(document: Document, max_chars: int, overlap_chars: int) -> Iterator[Passage]:
    """Parts of a document of at most `max_chars`, cut at paragraphs where possible, then at sentences, then at spaces.

    A passage begins with what the one before ended with, as many whole parts as fit into `overlap_chars`.
    """
    parts = _parts(document.text, max_chars)
    first = 0
    while first < len(parts):
        last = first
        while last + 1 < len(parts) and parts[last + 1][1] - parts[first][0] <= max_chars:
            last += 1
        start, end = parts[first][0], parts[last][1]
        yield Passage(document.name, start, end, document.text[start:end])
        if last + 1 == len(parts):
            return
        following = last + 1
        while following - 1 > first and end - parts[following - 1][0] <= overlap_chars:
            following -= 1
        # What is repeated must leave room for something new.
        while following <= last and parts[last + 1][1] - parts[following][0] > max_chars:
            following += 1
        first = following


def _parts(text: str, max_chars: int) -> list[tuple[int, int]]:
    """Spans of paragraphs; of sentences, words or plain characters where the larger part is too long."""
    spans = [(0, len(text))]
    for boundary in (_PARAGRAPH_END, _SENTENCE_END, _SPACE):
        always = boundary is _PARAGRAPH_END
        spans = [
            part
            for span in spans
            for part in (_split(text, span, boundary) if always or span[1] - span[0] > max_chars else [span])
        ]
    return [(first, min(first + max_chars, end)) for start, end in spans for first in range(start, end, max_chars)]


def _split(text: str, span: tuple[int, int], boundary: re.Pattern[str]) -> list[tuple[int, int]]:
    """The parts of a span between boundaries, without white space around them."""
    ends = [(found.start(), found.end()) for found in boundary.finditer(text, *span)]
    starts = [span[0], *(end for _, end in ends)]
    stops = [*(start for start, _ in ends), span[1]]
    found = []
    for start, stop in zip(starts, stops, strict=True):
        part = text[start:stop]
        first = start + len(part) - len(part.lstrip())
        last = stop - (len(part) - len(part.rstrip()))
        if first < last:
            found.append((first, last))
    return found


def _text(file: Path) -> str:
    with explain_os_errors(file):
        if file.stat().st_size > MAX_FILE_BYTES:
            raise DataError(
                f"{file} is larger than {MAX_FILE_BYTES:,} bytes; split it, or put its parts into a .jsonl file"
            )
        data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None


def _rows(file: Path, name: str, text_field: str) -> Iterator[Document]:
    for number, row in read_jsonl(file):
        text = row.get(text_field)
        if not isinstance(text, str):
            raise DataError(
                f"{file}:{number}: {text_field!r} must be a text, found {type(text).__name__}; the row has "
                f"{', '.join(map(repr, sorted(row)[:20]))}; set text_field"
            )
        yield Document(f"{name}:{number}", text)
