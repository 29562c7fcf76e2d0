"""From a variant's directory to its manifest."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TypeVar

from slmops.artifacts import FileEntry, digest_of
from slmops.config import explain
from slmops.errors import DataError, explain_os_errors
from slmops.release.format import (
    FILE_NAME,
    GENAI_CONFIG,
    RANGE_BYTES,
    EvidenceFile,
    Manifest,
    ReleaseFile,
    Requirements,
    refuse_native_code,
)

Hashed = TypeVar("Hashed", bound=ReleaseFile)


def build_manifest(directory: Path, variant: str, requirements: Requirements) -> Manifest:
    """Hash every file of `directory` and check that an edge node will accept it.

    Raises:
        DataError: a file that no release may carry; the message names it.
    """
    paths = sorted(directory.rglob("*"))
    for path in paths:
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not path.is_file() or not re.match(FILE_NAME, name):
            raise DataError(
                f"{path} may not be in a release: it takes flat, regular .onnx, .onnx.data, .json, .jinja, .txt and "
                ".model files only; remove it and quantize again"
            )
    config_path = directory / GENAI_CONFIG
    if not config_path.is_file():
        raise DataError(f"{directory} has no {GENAI_CONFIG}; give a directory that quantize wrote")
    with explain_os_errors(directory):
        refuse_native_code(config_path.read_bytes(), str(config_path))
        files = tuple(hash_file(path, path.name) for path in paths)
    try:
        return Manifest(variant=variant, files=files, requirements=requirements)
    except ValueError as error:
        raise DataError(_reason(error, directory)) from None


def hash_file(path: Path, name: str) -> ReleaseFile:
    """Size, digest and range digests of one file, in one pass."""
    return _hash(path, name, ReleaseFile)


def hash_evidence(path: Path) -> EvidenceFile:
    """The same of a file by which a release was judged."""
    return _hash(path, path.name, EvidenceFile)


def _hash(path: Path, name: str, kind: type[Hashed]) -> Hashed:
    whole, ranges, size = hashlib.sha256(), [], 0
    with open(path, "rb") as file:
        while chunk := file.read(RANGE_BYTES):
            whole.update(chunk)
            ranges.append(hashlib.sha256(chunk).hexdigest())
            size += len(chunk)
    fields = {"path": name, "size_bytes": size, "sha256": whole.hexdigest(), "ranges": tuple(ranges)}
    try:
        return kind.model_validate(fields)
    except ValueError as error:
        raise DataError(_reason(error, path)) from None


def variant_digest(manifest: Manifest) -> str:
    """The digest by which quantize and the gate know the variant's files."""
    return digest_of([FileEntry(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in manifest.files])


def _reason(error: ValueError, path: Path) -> str:
    from pydantic import ValidationError

    reason = explain(error, str(path)) if isinstance(error, ValidationError) else f"{path}: {error}"
    return f"{reason}; quantize again"
