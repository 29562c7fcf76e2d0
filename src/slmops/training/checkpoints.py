"""Checkpoints of a training run: one file of state and, written last, a manifest that names it.

    checkpoint-<step>.pt    weights, optimizer, schedule, curves
    checkpoint.json         which of those is whole: step, size, checksum, and the work that it belongs to

They lie in the run's work directory, or below `checkpoint_uri`, which a pod without a volume can reach: the state goes
there as an object of its own, and the manifest's object is replaced when it is all there. A kill at any moment leaves
the last checkpoint or the one before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmops.errors import ArtifactError, explain_os_errors
from slmops.storage import Store, fetch_object, open_store, sync_directory, write_atomically

MANIFEST = "checkpoint.json"
MAX_MANIFEST_BYTES = 10_000
IN_WORK_DIR = "work_dir"
"""The `checkpoint_uri` of a run whose work directory outlives it."""


class Manifest(BaseModel):
    """What `checkpoint.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    work: str = Field(min_length=1)
    """Name of the work directory, which is made of the step, its settings and its inputs."""
    step: int = Field(ge=0)
    """Optimizer steps that are done."""
    file: str = Field(pattern=r"^checkpoint-\d+\.pt$")
    size_bytes: int = Field(ge=0)
    xxh3_128: str = Field(pattern=r"^[0-9a-f]{32}$")


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, work_dir: Path, uri: str = IN_WORK_DIR) -> None:
        """Keep them in `work_dir`, or in a folder of its name below `uri`.

        Raises:
            StoreError: `uri` is no place that can be written.
        """
        self.work_dir = work_dir
        self.store: Store | None = None if uri == IN_WORK_DIR else open_store(uri)
        self._step: int | None = None
        """Of the checkpoint that the manifest names."""

    @property
    def where(self) -> str:
        return f"{self.store.uri}/{self.work_dir.name}" if self.store else str(self.work_dir)

    def save(self, state: dict[str, Any], step: int) -> None:
        """Write a checkpoint, then remove the ones before. One that is there already is never written over.

        Raises:
            DiskFullError: there is no room; what was written of it is gone, and the one before is still there.
            StoreError, StoreUnavailable: the store does not take it.
        """
        if step == self._step:
            return
        path = self.work_dir / f"checkpoint-{step}.pt"
        try:
            with explain_os_errors(path):
                _write(state, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        # From here on the manifest may name the file, also where an error says that it was not written.
        manifest = Manifest(
            work=self.work_dir.name,
            step=step,
            file=path.name,
            size_bytes=path.stat().st_size,
            xxh3_128=_checksum(path),
        )
        self._publish(manifest, path)
        self._step = step
        self._remove_all_but(manifest.file)

    def load(self, device: torch.device) -> tuple[dict[str, Any], int] | None:
        """The last checkpoint and its step, if there is one.

        Raises:
            ArtifactError: it is damaged, or belongs to other settings or inputs.
            StoreError, StoreUnavailable: the store does not give it.
        """
        text = self._read_manifest()
        if text is None:
            return None
        try:
            manifest = Manifest.model_validate_json(text)
        except ValidationError:
            raise ArtifactError(f"{self.where}/{MANIFEST} is no manifest of a checkpoint; {self._remedy}") from None
        if manifest.work != self.work_dir.name:
            raise ArtifactError(
                f"the checkpoint in {self.where} belongs to {manifest.work}: other settings or inputs; {self._remedy}"
            )
        with tempfile.TemporaryDirectory(dir=self.work_dir) as directory:  # of this process: others load it, too
            path = self.work_dir / manifest.file
            if self.store:
                path = Path(directory) / manifest.file
                fetch_object(self.store, self._key(manifest.file), path)
            self._check(path, manifest)
            self._step = manifest.step
            return torch.load(path, map_location=device, weights_only=True), manifest.step

    def _check(self, path: Path, manifest: Manifest) -> None:
        """
        Raises:
            ArtifactError: the file is not the one that the manifest describes.
        """
        size = path.stat().st_size if path.is_file() else None
        if size != manifest.size_bytes:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise ArtifactError(f"{path} {found}, {MANIFEST} says {manifest.size_bytes:,} bytes; {self._remedy}")
        if _checksum(path) != manifest.xxh3_128:
            raise ArtifactError(f"{path} does not have the checksum that {MANIFEST} says; {self._remedy}")

    def remove(self) -> None:
        """Remove all of it, the work directory too: the run is done."""
        if self.store:
            for key in list(self.store.list(self._key(""))):
                self.store.delete(key)
        shutil.rmtree(self.work_dir)

    @property
    def _remedy(self) -> str:
        return f"remove {self.where} to start over"

    def _key(self, name: str) -> str:
        return f"{self.work_dir.name}/{name}"

    def _publish(self, manifest: Manifest, path: Path) -> None:
        data = (manifest.model_dump_json(indent=1) + "\n").encode()
        if self.store is None:
            write_atomically(self.work_dir / MANIFEST, data)
            return
        key = self._key(manifest.file)
        self.store.delete(key)  # of a run that was killed behind this line
        self.store.create(key, path)
        found = self.store.stat(self._key(MANIFEST))
        if not self.store.replace(self._key(MANIFEST), data, found.etag if found else None):
            raise ArtifactError(f"another run writes checkpoints to {self.where} at the same time; stop one of them")

    def _read_manifest(self) -> bytes | None:
        if self.store:
            key = self._key(MANIFEST)
            return self.store.read(key, MAX_MANIFEST_BYTES) if self.store.stat(key) else None
        path = self.work_dir / MANIFEST
        with explain_os_errors(path):
            return path.read_bytes() if path.exists() else None

    def _remove_all_but(self, name: str) -> None:
        for path in self.work_dir.glob("checkpoint-*.pt"):
            if path.name != name:
                path.unlink(missing_ok=True)
        if self.store:
            for key in list(self.store.list(self._key("checkpoint-"))):
                if key != self._key(name):
                    self.store.delete(key)


def _write(state: dict[str, Any], path: Path) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)
    except RuntimeError as error:  # torch's writer wraps the operating system's error in one of its own
        raise OSError(28, str(error), str(path)) from error


def _checksum(path: Path) -> str:
    checksum = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            checksum.update(piece)
    return checksum.hexdigest()
