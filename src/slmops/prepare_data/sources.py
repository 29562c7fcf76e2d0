"""Where rows come from: a file, a folder of them, one that `datasets` saved, or a repository on a hub."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import hub, storage
from slmops.artifacts import digest_of, file_digest, list_files
from slmops.errors import ConfigError, DataError, TransientError
from slmops.prepare_data.readers import READERS, Row, read_arrow
from slmops.prepare_data.splitting import Split

if TYPE_CHECKING:
    from datasets import IterableDataset  # type: ignore[import-untyped]

SAVED_DATASET, SAVED_DICT = "state.json", "dataset_dict.json"
"""Files that `datasets` leaves in a folder that it saved a Dataset or a DatasetDict to."""

# As `datasets` does: a word in the file's name or in a folder of it, with something else or nothing around it.
_SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a source, or one split of a repository."""

    name: str
    """How its rows are called: `<name>:<line>`."""
    read: Callable[[], Iterator[Row]]
    split: Split | None = None
    """The split that its place says; its rows have that in the split column if they have no such column."""


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be read."""

    parts: tuple[Part, ...]
    format: str
    """`CSV`, `a folder of Parquet files`."""
    why: str
    """What it was recognised by."""
    digest: str
    """SHA-256 of the content."""
    size_bytes: int = 0
    """0 where nobody says."""

    def rows(self, skip: int, split_column: str) -> Iterator[tuple[int, Row]]:
        """(number of the part, row) of all rows behind the first `skip`."""
        every = ((number, row) for number, part in enumerate(self.parts) for row in part.read())
        for number, row in islice(every, skip, None):
            if (split := self.parts[number].split) and not row.problem:
                row.columns.setdefault(split_column, split)
            yield number, row


def open_source(uri: str, directory: Path) -> Source:
    """The source at `uri`; what lies on S3 is copied into `directory` first.

    Raises:
        ConfigError: no reader for such a file.
        DataError: there is no data in it.
        StoreError, TransientError: it cannot be reached.
    """
    if uri.startswith(hub.SCHEME):
        return _on_hub(uri)
    if "://" in uri:
        _reader(uri, Path(uri))
    path = storage.fetch(uri, directory)
    if path.is_dir():
        return _in_folder(uri, path)
    name, read = _reader(uri, path)
    if path.exists() and not path.is_file():
        raise DataError(f"{uri} is no file; give one of {', '.join(READERS)}, or a folder of them")
    if not path.exists():
        raise DataError(f"{uri} does not exist; check the path")
    return Source(
        (Part(uri, partial(read, path)),),
        name,
        f"its name ends in {path.suffix.lower()}",
        file_digest(path),
        path.stat().st_size,
    )


def _reader(uri: str, path: Path) -> tuple[str, Callable[[Path], Iterator[Row]]]:
    if path.suffix.lower() not in READERS:
        raise ConfigError(f"source_uri must end in {', '.join(READERS)}, or name a folder, got {uri!r}; convert it")
    return READERS[path.suffix.lower()]


def _in_folder(uri: str, path: Path) -> Source:
    """A folder that `datasets` saved, else the data files of a repository."""
    if (path / SAVED_DICT).is_file():
        names = _read_json(path / SAVED_DICT)["splits"]
        parts = [part for name in names for part in _saved(f"{uri}/{name}", path / name, _split_of(name))]
        form, why = "a DatasetDict that datasets saved", f"it holds {SAVED_DICT}"
    elif (path / SAVED_DATASET).is_file():
        parts = list(_saved(uri, path, None))
        form, why = "a Dataset that datasets saved", f"it holds {SAVED_DATASET}"
    else:
        parts, form, why = _data_files(uri, path)
    entries = tuple(list_files(path))
    return Source(tuple(parts), form, why, digest_of(entries), sum(entry.size_bytes for entry in entries))


def _saved(uri: str, path: Path, split: Split | None) -> Iterator[Part]:
    names = [one["filename"] for one in _read_json(path / SAVED_DATASET)["_data_files"]]
    classes = _class_names(_read_json(path / "dataset_info.json").get("features") or {})
    for name in names:
        read = partial(read_arrow, path / name)
        yield Part(f"{uri}/{name}", partial(_name_classes, read, classes) if classes else read, split)


def _data_files(uri: str, path: Path) -> tuple[list[Part], str, str]:
    """The files with the ending that most of them have; splits by their names."""
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and file.suffix.lower() in READERS
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.name not in ("dataset_info.json", "dataset_infos.json")
    ]
    if not found:
        raise DataError(f"{uri} holds no file that ends in {', '.join(READERS)}; give the folder with the data")
    endings = Counter(file.suffix.lower() for file in found)
    if len(endings) > 1:
        counted = ", ".join(f"{count} {ending}" for ending, count in endings.most_common())
        raise DataError(f"{uri} holds files of several kinds ({counted}); give a folder with one kind, or one file")
    name, read = READERS[found[0].suffix.lower()]
    parts = []
    for file in found:
        place = file.relative_to(path)
        parts.append(Part(f"{uri}/{place.as_posix()}", partial(read, file), _split_of(place.as_posix())))
    files = "1 file" if len(parts) == 1 else f"{len(parts)} files"
    return parts, f"a folder of {name}", f"it holds {files} that end in {found[0].suffix.lower()}"


def _on_hub(uri: str) -> Source:
    dataset, commit = hub.parse(uri), hub.commit_of(uri)
    splits = stream_splits(dataset.name, uri=uri, config=dataset.config, revision=commit)
    why = f"it begins with {hub.SCHEME}; commit {commit}"
    return Source(tuple(splits), "a datasets repository", why, digest=_text_digest(f"{dataset}@{commit}"))


def stream_splits(name: str, *, uri: str, config: str | None, revision: str | None) -> Iterator[Part]:
    """The splits of what `datasets` knows as `name`, to be read without a copy on disk.

    Raises:
        DataError: `datasets` cannot make rows of it.
    """
    import datasets

    with _explained(uri):
        found = datasets.load_dataset(name, config, revision=revision, streaming=True)
    for split, rows in found.items():
        classes = _class_names(rows.features.to_dict() if rows.features else {})
        read = partial(_stream, uri, rows)
        yield Part(f"{uri}:{split}", partial(_name_classes, read, classes) if classes else read, _split_of(str(split)))


def _stream(uri: str, rows: IterableDataset) -> Iterator[Row]:
    with _explained(uri):
        for number, columns in enumerate(rows, 1):
            yield Row(number, dict(columns))


class _explained:  # noqa: N801 - reads as what it does
    """What `datasets` raises becomes an error that says what to do."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        import httpx2

        if isinstance(error, ConnectionError | TimeoutError | httpx2.HTTPError):
            raise TransientError(f"{self._uri}: the hub stopped answering ({type(error).__name__})") from None
        if isinstance(error, Exception):
            said = " ".join(str(error).split())[:500]
            raise DataError(f"{self._uri}: datasets cannot read it: {type(error).__name__}: {said}") from None


def _class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the classes of each column that holds their numbers."""
    return {
        column: list(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _name_classes(read: Callable[[], Iterable[Row]], classes: dict[str, list[str]]) -> Iterator[Row]:
    """Rows with the names of classes instead of their numbers: a language model answers in words."""
    for row in read():
        for column, names in classes.items():
            value = row.columns.get(column)
            if isinstance(value, int) and 0 <= value < len(names):
                row.columns[column] = names[value]
        yield row


def _split_of(place: str) -> Split | None:
    """The split that a path or name says, the last such word of it."""
    words = [word for word in re.split(r"[^a-z]+", place.lower()) if word in _SPLIT_WORDS]
    return _SPLIT_WORDS[words[-1]] if words else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); the copy is not complete, copy it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(found).__name__}; copy the folder again")
    return found


def _text_digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()
