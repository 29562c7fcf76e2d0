"""One variant as a ModelPack: an OCI artifact that any registry takes, and that Kubernetes mounts as a volume.

The format is the CNCF's model-spec (github.com/modelpack/model-spec: docs/spec.md, docs/config.md, specs-go/v1): an OCI
image manifest with an artifact type, a config, and one layer per file with the file's own bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slmops.artifacts import file_digest
from slmops.config import explain
from slmops.errors import ArtifactError, CorruptDownload, DataError, DiskFullError, StoreError, explain_os_errors
from slmops.packaging.registry import MANIFEST_TYPE, Registry, Target
from slmops.progress import Progress, log
from slmops.release.format import (
    FILE_NAME,
    GENAI_CONFIG,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_GENAI_CONFIG_BYTES,
    refuse_native_code,
)

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
SETTINGS_TYPE = "application/vnd.cncf.model.weight.config.v1.raw"
DOC_TYPE = "application/vnd.cncf.model.doc.v1.raw"
FILE_PATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"
"""Where tools that know OCI artifacts, but no models, look for a file's name."""
CARD = "README.md"
MAX_CARD_BYTES = 1024 * 1024
MAX_CONFIG_BYTES = 1024 * 1024

_DIGEST = r"^sha256:[0-9a-f]{64}$"


@dataclass(frozen=True)
class Description:
    """What the artifact's config says of the model. What is not known is left out."""

    name: str | None = None
    family: str | None = None
    """Such as llama: the architecture's name."""
    licence: str | None = None
    """An SPDX identifier."""
    precision: str | None = None
    """Such as int4."""
    quantization: str | None = None
    """The algorithm, such as rtn or gptq."""
    param_size: str | None = None
    """Parameters with a letter for their magnitude, such as 135m."""

    def config(self, digests: Sequence[str]) -> dict[str, Any]:
        """docs/config.md; `digests` of the layers, in their order. No time: the same files give the same digest."""
        descriptor = {"name": self.name, "family": self.family, "licenses": [self.licence] if self.licence else None}
        technical = {
            "architecture": "transformer",
            "format": "onnx",
            "paramSize": self.param_size,
            "precision": self.precision,
            "quantization": self.quantization,
        }
        return {
            "descriptor": {name: value for name, value in descriptor.items() if value},
            "config": {name: value for name, value in technical.items() if value},
            "modelfs": {"type": "layers", "diffIds": list(digests)},
        }


class _Object(BaseModel):
    """Fields that are not known are left alone, as OCI asks of readers."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", populate_by_name=True)


Parsed = TypeVar("Parsed", bound=_Object)


class _Config(_Object):
    media_type: Literal["application/vnd.cncf.model.config.v1+json"] = Field(alias="mediaType")
    digest: str = Field(pattern=_DIGEST)
    size: int = Field(ge=1, le=MAX_CONFIG_BYTES)


class _Layer(_Object):
    media_type: Literal[
        "application/vnd.cncf.model.weight.v1.raw",
        "application/vnd.cncf.model.weight.config.v1.raw",
        "application/vnd.cncf.model.doc.v1.raw",
    ] = Field(alias="mediaType")
    digest: str = Field(pattern=_DIGEST)
    size: int = Field(ge=1, le=MAX_FILE_BYTES)
    annotations: dict[str, str] = Field(max_length=100)

    @property
    def name(self) -> str:
        return self.annotations[FILE_PATH]

    @model_validator(mode="after")
    def _has_a_name_that_a_release_may_have(self) -> Self:
        name = self.annotations.get(FILE_PATH)
        if name is None or not _may_be_named(name):
            raise ValueError(
                f"{name!r:.120} may not be a file of a model: it takes flat .onnx, .onnx.data, .json, .jinja, .txt and "
                f".model files and {CARD} only"
            )
        if self.size > (most := _max_bytes(name)):
            raise ValueError(f"{name} has {self.size:,} bytes; it may have {most:,}")
        return self


class _Manifest(_Object):
    schema_version: Literal[2] = Field(alias="schemaVersion")
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"] = Field(alias="mediaType")
    artifact_type: Literal["application/vnd.cncf.model.manifest.v1+json"] = Field(alias="artifactType")
    config: _Config
    layers: list[_Layer] = Field(min_length=1, max_length=MAX_FILES + 1)

    @model_validator(mode="after")
    def _is_one_model(self) -> Self:
        names = [layer.name for layer in self.layers]
        if len({name.lower() for name in names}) != len(names):
            raise ValueError("files must have different names")
        if GENAI_CONFIG not in names:
            raise ValueError(f"files must have a {GENAI_CONFIG}")
        return self


class _ModelFiles(_Object):
    type: Literal["layers"]
    diff_ids: list[str] = Field(alias="diffIds", max_length=MAX_FILES + 1)


class _ModelConfig(_Object):
    modelfs: _ModelFiles


def push(
    directory: Path,
    target: str,
    *,
    card: str | None = None,
    description: Description | None = None,
    insecure: bool = False,
) -> str:
    """Write a variant's files, and a model card if there is one, to a registry; return the manifest's digest.

    The manifest comes last, so that readers see all of it or nothing. Files that the registry has are not sent again,
    and the same files, card and description give the same digest.

    Args:
        directory: One variant, as quantize writes it.
        target: HOST/REPOSITORY:TAG, with a port behind the host if wanted.
        card: Markdown, which becomes README.md; without one, a README.md of the directory goes along.
        description: What to say of the model.
        insecure: Speak plain HTTP to a registry on another machine.

    Raises:
        DataError: a file that no release may carry.
        StoreError, StoreUnavailable: the registry refuses, or does not answer.
    """
    registry = Registry(Target.parse(target), insecure=insecure)
    if registry.target.tag is None:
        raise StoreError(f"{target} has no tag; give the artifact one, as in HOST/REPOSITORY:TAG")
    contents: dict[str, bytes | Path] = {path.name: path for path in _files(directory)}
    if card is not None:
        contents[CARD] = _card_bytes(card)
    with explain_os_errors(directory):
        layers = [_layer(name, content) for name, content in sorted(contents.items())]
    digests = [layer["digest"] for layer in layers]
    config = json.dumps((description or Description()).config(digests), sort_keys=True).encode()
    config_digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    with Progress("push", len(layers), "files") as progress, explain_os_errors(directory):
        for layer in layers:
            registry.upload_blob(contents[layer["annotations"][FILE_PATH]], layer["digest"], layer["size"])
            progress.advance()
    registry.upload_blob(config, config_digest, len(config))
    data = _manifest({"mediaType": CONFIG_TYPE, "digest": config_digest, "size": len(config)}, layers)
    registry.put_manifest(data, MANIFEST_TYPE)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    log.info("%s: %d files, %s", target, len(layers), digest)
    return digest


def pull(target: str, directory: Path, *, insecure: bool = False) -> str:
    """Write the files of a ModelPack to a new directory, each checked, all or none; return the manifest's digest.

    A target with a digest gives these bytes or an error, whoever can write to the registry.

    Raises:
        ArtifactError: `directory` exists already.
        CorruptDownload: bytes do not match their digest.
        DataError: the artifact is none of ours in form, names files that no model may have, or native code.
        DiskFullError: it does not fit.
        StoreError, StoreUnavailable: the registry refuses, or does not answer.
    """
    registry = Registry(Target.parse(target), insecure=insecure)
    if directory.exists():
        raise ArtifactError(f"{directory} exists already; give another directory, or remove it")
    data, digest = registry.read_manifest()
    manifest = _parse(_Manifest, data, target)
    _check_config(registry, manifest, target)
    size = sum(layer.size for layer in manifest.layers)
    with explain_os_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(directory.parent).free < size:
            raise DiskFullError(f"{directory} needs {size:,} bytes, more than are free; free some space and pull again")
        partial = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}.partial")
        partial.mkdir()
    try:
        with Progress("pull", len(manifest.layers), "files") as progress:
            for layer in manifest.layers:
                registry.download_blob(layer.digest, layer.size, partial / layer.name)
                progress.advance()
        refuse_native_code((partial / GENAI_CONFIG).read_bytes(), f"{target}: {GENAI_CONFIG}")
        with explain_os_errors(directory):
            os.rename(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    log.info("%s: %d files, %s bytes, %s", directory, len(manifest.layers), f"{size:,}", digest)
    return digest


def _files(directory: Path) -> list[Path]:
    """The files of a variant, by name.

    Raises:
        DataError: one that no release may carry.
    """
    paths = sorted(directory.iterdir()) if directory.is_dir() else []
    if not (directory / GENAI_CONFIG).is_file():
        raise DataError(f"{directory} has no {GENAI_CONFIG}; give one variant's directory, such as variants/cpu-int4")
    for path in paths:
        if path.is_symlink() or not path.is_file() or not _may_be_named(path.name):
            raise DataError(
                f"{path} may not be exported: a model takes flat, regular .onnx, .onnx.data, .json, .jinja, .txt and "
                f".model files and {CARD} only; remove it"
            )
        if not 1 <= path.stat().st_size <= (most := _max_bytes(path.name)):
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; it may have 1 to {most:,}")
    if len(paths) > MAX_FILES + 1:
        raise DataError(f"{directory} has {len(paths)} files, a model has at most {MAX_FILES} and {CARD}")
    with explain_os_errors(directory):
        refuse_native_code((directory / GENAI_CONFIG).read_bytes(), str(directory / GENAI_CONFIG))
    return paths


def _manifest(config: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> bytes:
    """The image manifest over the descriptors of a config and of files."""
    fields = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": ARTIFACT_TYPE}
    return json.dumps(fields | {"config": config, "layers": layers}, sort_keys=True).encode()


def _card_bytes(card: str) -> bytes:
    data = card.encode()
    if not 1 <= len(data) <= MAX_CARD_BYTES:
        raise DataError(f"the model card has {len(data):,} bytes; it may have 1 to {MAX_CARD_BYTES:,}")
    return data


def _layer(name: str, content: bytes | Path) -> dict[str, Any]:
    """A file's descriptor."""
    whole = file_digest(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    return {
        "mediaType": DOC_TYPE if name == CARD else WEIGHT_TYPE if ".onnx" in name else SETTINGS_TYPE,
        "digest": f"sha256:{whole}",
        "size": content.stat().st_size if isinstance(content, Path) else len(content),
        "annotations": {FILE_PATH: name, TITLE: name},
    }


def _may_be_named(name: str) -> bool:
    return name == CARD or re.fullmatch(FILE_NAME, name) is not None


def _max_bytes(name: str) -> int:
    """What is read as a whole is small."""
    return {GENAI_CONFIG: MAX_GENAI_CONFIG_BYTES, CARD: MAX_CARD_BYTES}.get(name, MAX_FILE_BYTES)


def _check_config(registry: Registry, manifest: _Manifest, target: str) -> None:
    """The config lists the layers again, by the digests of what is in them: for raw layers, the layers' own."""
    data = registry.read_blob(manifest.config.digest, manifest.config.size)
    listed = _parse(_ModelConfig, data, f"{target}: its config").modelfs.diff_ids
    if listed != [layer.digest for layer in manifest.layers]:
        raise CorruptDownload(f"{target}: config and manifest list different files; push the artifact again")


def _parse(kind: type[Parsed], data: bytes, where: str) -> Parsed:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise DataError(f"{where} is no ModelPack that is taken here: {explain(error, 'it')}") from None
