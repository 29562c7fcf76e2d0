"""What slmops knows about an artifact: the sidecar `slmops.json` in its directory.

The sidecar is written last and the directory is renamed into place, so a directory that has a sidecar is complete.
It carries the summaries of all ancestors, so that one artifact is enough to draw its whole lineage.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmops import __version__
from slmops.config import Config
from slmops.errors import ArtifactError, explain_full_disk, explain_os_errors

SIDECAR = "slmops.json"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""The only form of a digest: 64 lowercase hex digits of SHA-256."""

Kind = Literal[
    "chat_dataset",
    "responses",
    "hf_model",
    "variants",
    "evaluation",
    "lm_evaluation",
    "benchmark",
    "comparison",
    "verdict",
    "release",
    "report",
]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Entry):
    """One file of an artifact."""

    path: str
    size_bytes: int = Field(ge=0)
    sha256: Sha256


class Summary(_Entry):
    """What later steps need to know of an artifact: who made it, from what, how, and what came out."""

    kind: Kind
    digest: Sha256
    step: str
    created_at: datetime
    duration_s: float
    slmops_version: str
    parents: tuple[Sha256, ...] = ()
    config: dict[str, Any] = {}
    facts: dict[str, Any] = {}


class Sidecar(Summary):
    """The whole of `slmops.json`."""

    schema_version: Literal[1] = 1
    files: tuple[FileEntry, ...]
    ancestors: tuple[Summary, ...] = ()

    def summary(self) -> Summary:
        return Summary(**{name: getattr(self, name) for name in Summary.model_fields})

    def metadata(self) -> dict[str, Any]:
        """What is mirrored into the KFP artifact's metadata: scalars only, as KFP's store takes no nesting."""
        texts = {name: value for name, value in self.facts.items() if isinstance(value, str | bool)}
        return (
            {"kind": self.kind, "digest": self.digest, "slmops_version": self.slmops_version} | texts | self.metrics()
        )

    def metrics(self) -> dict[str, float]:
        """The numeric facts; those that are not finite are left out, because JSON has no word for them."""
        numbers = {name: value for name, value in self.facts.items() if isinstance(value, int | float)}
        return {n: v for n, v in numbers.items() if not isinstance(v, bool) and math.isfinite(v)}

    def write_metrics(self, path: Path) -> dict[str, float]:
        """Write `metrics` as JSON, and return them.

        KFP keeps metrics in an artifact's metadata, but counts a step as done only if each output exists as a file.
        """
        metrics = self.metrics()
        write_json(path, metrics)
        return metrics


class Draft:
    """An artifact that is being written: put files below `path`, facts into `facts`."""

    sidecar: Sidecar
    """Set once the artifact is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}


@contextmanager
def writing(
    path: Path, *, kind: Kind, step: str, config: Config | None = None, parents: Sequence[Sidecar] = ()
) -> Iterator[Draft]:
    """Write an artifact so that `path` either holds all of it or does not exist.

    Files go to a sibling directory, which is renamed to `path` after its sidecar was written. If the body raises,
    the sibling is removed. After the block `draft.sidecar` is the sidecar.

    Raises:
        ArtifactError: `path` already holds something that is not an artifact.
    """
    started = time.monotonic()
    if path.exists() and not (path / SIDECAR).exists() and (path.is_file() or any(path.iterdir())):
        raise ArtifactError(f"{path} exists and is not an artifact of slmops; choose another output, or remove it")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    draft = Draft(partial)
    try:
        with explain_full_disk(partial):
            partial.mkdir(parents=True)
            yield draft
            files = tuple(list_files(partial))
            draft.sidecar = Sidecar(
                kind=kind,
                digest=digest_of(files),
                step=step,
                created_at=datetime.now(UTC),
                duration_s=round(time.monotonic() - started, 3),
                slmops_version=__version__,
                parents=tuple(parent.digest for parent in parents),
                config=config.parameters() if config else {},
                facts=draft.facts,
                files=files,
                ancestors=_ancestors(parents),
            )
            (partial / SIDECAR).write_text(draft.sidecar.model_dump_json(indent=1) + "\n")
            shutil.rmtree(path, ignore_errors=True)
            os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read(path: Path) -> Sidecar:
    """The sidecar of the artifact at `path`, checked against the sizes of its files.

    Raises:
        ArtifactError: it is missing, half-written or damaged.
    """
    sidecar_path = path / SIDECAR
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; check the path, or run the step that writes it")
    if not sidecar_path.is_file():
        raise ArtifactError(f"{path} has no {SIDECAR}: the step that wrote it did not finish; run that step again")
    with explain_os_errors(sidecar_path):
        text = sidecar_path.read_bytes()
    try:
        sidecar = Sidecar.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise ArtifactError(f"{sidecar_path}: {where}: {first['msg']}; run the step that wrote it again") from None
    for entry in sidecar.files:
        found = path / entry.path
        size = found.stat().st_size if found.is_file() else None
        if size != entry.size_bytes:
            state = "is missing" if size is None else f"has {size:,} bytes"
            raise ArtifactError(
                f"{found} {state}, {SIDECAR} says {entry.size_bytes:,} bytes; run the step that wrote it again"
            )
    return sidecar


def expect(path: Path, *kinds: Kind) -> Sidecar:
    """`read`, and the artifact is of one of `kinds`.

    Raises:
        ArtifactError: it is not.
    """
    sidecar = read(path)
    if sidecar.kind not in kinds:
        raise ArtifactError(f"{path} holds {sidecar.kind}, but this input takes {' or '.join(kinds)}")
    return sidecar


def verify(path: Path, *names: str) -> None:
    """Compare files of the artifact at `path` with their digests, which `read` leaves out, because it takes a while.

    Raises:
        ArtifactError: a file was changed since the artifact was written.
    """
    for entry in read(path).files:
        if entry.path in names and file_digest(path / entry.path) != entry.sha256:
            raise ArtifactError(
                f"{path / entry.path} was changed after the artifact was written, and what belongs to it was not; run "
                "the step that wrote it again"
            )


def write_json(path: Path, value: object) -> None:
    """Write an output that is one JSON file."""
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1) + "\n")


def list_files(root: Path) -> Iterator[FileEntry]:
    """Every file below `root` but the sidecar, sorted by path, hashed."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and path != root / SIDECAR:
            yield FileEntry(
                path=path.relative_to(root).as_posix(), size_bytes=path.stat().st_size, sha256=file_digest(path)
            )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(files: Sequence[FileEntry]) -> str:
    """SHA-256 of the canonical JSON of the sorted [path, size, digest] rows: the same files, the same digest."""
    rows = sorted([entry.path, entry.size_bytes, entry.sha256] for entry in files)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def _ancestors(parents: Sequence[Sidecar]) -> tuple[Summary, ...]:
    """Parents and their ancestors, each once, oldest first. Different steps may write the same bytes."""
    found: dict[tuple[object, ...], Summary] = {}
    for parent in parents:
        for summary in (*parent.ancestors, parent.summary()):
            found.setdefault((summary.digest, summary.step, summary.parents), summary)
    return tuple(sorted(found.values(), key=lambda summary: summary.created_at))
