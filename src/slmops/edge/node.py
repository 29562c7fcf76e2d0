"""What lies on an edge node: releases, which of them is current, and what the node accepted last.

<root>/current                   symlink to releases/<release digest>, moved by one rename
<root>/releases/<digest>/        the files of one variant, and nothing else
<root>/releases/<digest>.json    its record: release, variant, manifest
<root>/staging/<digest>/         a release that is being fetched, by the digest of its manifest
<root>/state.json                sequence last accepted per channel, and the release before the current one
<root>/.lock                     held while a pull runs
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmops.artifacts import Sha256, file_digest
from slmops.config import explain
from slmops.errors import ArtifactError, explain_os_errors
from slmops.release.format import Manifest
from slmops.storage import sync_directory, write_atomically


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Installed(_Stored):
    """The record of a release on this node."""

    release_digest: Sha256
    manifest: Manifest


class State(_Stored):
    """What must outlast a restart."""

    sequences: dict[str, int] = {}
    """Channel to the sequence last accepted."""
    releases: dict[str, Sha256] = {}
    """Channel to the release of that sequence."""
    previous: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """The release that was current before the current one."""


def release_path(root: Path, digest: str) -> Path:
    return root / "releases" / digest


def record_path(root: Path, digest: str) -> Path:
    return root / "releases" / f"{digest}.json"


def current_digest(root: Path) -> str | None:
    """The digest of the current release, or None before the first pull."""
    try:
        return Path(os.readlink(root / "current")).name
    except FileNotFoundError:
        return None
    except OSError:
        raise ArtifactError(f"{root / 'current'} is no symlink; remove it and pull again") from None


def switch(root: Path, digest: str) -> None:
    """Make a release current: at every moment the link leads to the old one or to the new one."""
    link = root / "current.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("releases") / digest)
    os.replace(link, root / "current")
    sync_directory(root)


def read_state(root: Path) -> State:
    """The node's state; the empty one before the first pull.

    Raises:
        ArtifactError: the file is damaged. It holds the protection against rollback, so it is not replaced in silence.
    """
    path = root / "state.json"
    try:
        return State.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return State()
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged: {explain(error, 'State')}; remove it to accept any sequence") from None


def write_state(root: Path, state: State) -> None:
    write_atomically(root / "state.json", state.model_dump_json().encode())


def open_current(root: Path) -> tuple[Installed, Path]:
    """The current release and its directory, every file hashed: ONNX Runtime runs damaged weights without an error.

    Raises:
        ArtifactError: there is none, or a file does not match the manifest.
    """
    digest = current_digest(root)
    if digest is None:
        raise ArtifactError(f"{root} holds no release; pull one first")
    record = read_record(root, digest)
    path = release_path(root, digest)
    for file in record.manifest.files:
        found = path / file.path
        with explain_os_errors(found):
            if found.is_symlink() or file_digest(found) != file.sha256:
                raise ArtifactError(f"{found} is damaged: it does not match its manifest; remove {path} and pull again")
    extra = {entry.name for entry in path.iterdir()} - {file.path for file in record.manifest.files}
    if extra:
        raise ArtifactError(f"{path} holds {sorted(extra)[0]}, which its manifest does not name; remove it")
    return record, path


def read_record(root: Path, digest: str) -> Installed:
    """The record of an installed release.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    path = record_path(root, digest)
    with explain_os_errors(path):
        data = path.read_bytes()
    try:
        record = Installed.model_validate_json(data)
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged: {explain(error, 'Installed')}; remove it and pull again") from None
    if record.release_digest != digest:
        raise ArtifactError(f"{path} is the record of another release; remove it and pull again")
    return record
