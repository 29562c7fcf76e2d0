"""The objects of a release, strictly read: a manifest per variant, the release, the channel that points to one.

Everything but the channel is named by its SHA-256, so a reader who trusts the channel can verify all of the rest.
What the objects may hold is capped in size and count, file names follow an allow-list, and no file may bring native
code: an edge node reads these before it trusts anything else.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slmops.artifacts import Kind, Sha256
from slmops.config import explain
from slmops.errors import CorruptDownload, DataError
from slmops.storage import Store

RANGE_BYTES = 4 * 1024 * 1024
"""A file is fetched and verified in ranges of this size; the last one may be shorter."""
MAX_FILE_BYTES = 5 * 1024**3
"""The largest object that S3 takes in one request."""
MAX_FILES = 64
MAX_OBJECT_BYTES = 8 * 1024 * 1024
"""The largest manifest or release: 64 files of 5 GiB need 5.5 MB of range digests."""
MAX_REASON = 2000
"""Characters of a gate's reason."""
GENAI_CONFIG = "genai_config.json"
MAX_GENAI_CONFIG_BYTES = 1024 * 1024

DEVICE_CLASS = r"^([a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?)?$"
FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,100}\.(onnx|onnx\.data|json|jinja|txt|model)$"
"""Flat names of graphs, weights, settings, templates and vocabularies; no library, archive or pickle."""


InstructionSet = Annotated[str, Field(pattern=r"^[A-Z0-9_]{1,32}$")]


class _Object(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class _Stored(_Object):
    """An object of its own in the store."""

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same content has the same bytes, and so the same digest."""
        content = self.model_dump(mode="json")
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of `to_bytes`, by which the object is stored."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


class ReleaseFile(_Object):
    """One file of a variant."""

    path: str = Field(pattern=FILE_NAME)
    size_bytes: int = Field(ge=1, le=MAX_FILE_BYTES)
    sha256: Sha256
    ranges: tuple[Sha256, ...] = Field(strict=False, max_length=MAX_FILE_BYTES // RANGE_BYTES)
    """SHA-256 of each range of RANGE_BYTES."""

    @model_validator(mode="after")
    def _ranges_cover_the_file(self) -> Self:
        expected = -(-self.size_bytes // RANGE_BYTES)
        if len(self.ranges) != expected:
            raise ValueError(f"ranges must be {expected} digests for {self.size_bytes} bytes, got {len(self.ranges)}")
        return self

    def range_at(self, index: int) -> tuple[int, int]:
        """(first byte, length) of range `index`."""
        start = index * RANGE_BYTES
        return start, min(RANGE_BYTES, self.size_bytes - start)


class EvidenceFile(ReleaseFile):
    """What a release was judged by, for people and tools; no node runs it."""

    path: Literal["verdict.json", "README.md"]
    """The gate's verdict; the model card."""


class Requirements(_Object):
    """What a machine must have to run a variant."""

    architectures: tuple[Literal["aarch64", "x86_64"], ...] = Field(strict=False, min_length=1)
    instruction_sets: tuple[InstructionSet, ...] = Field(default=(), strict=False, max_length=32)
    """Features of the processor that the variant was measured with, as Node Feature Discovery labels them."""
    execution_provider: Literal["cpu", "cuda"] = "cpu"
    runtime: Literal["onnxruntime-genai"]
    runtime_version: str = Field(pattern=r"^\d{1,6}(\.\d{1,6}){0,3}$")
    """The oldest version: the one that the gate's benchmark ran with."""
    ram_bytes: int = Field(ge=0)
    """Peak resident memory of that benchmark."""


class Manifest(_Stored):
    """One variant: its files, and what it needs."""

    schema_version: Literal[1] = 1
    variant: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    files: tuple[ReleaseFile, ...] = Field(strict=False, min_length=1, max_length=MAX_FILES)
    requirements: Requirements

    @model_validator(mode="after")
    def _is_one_model(self) -> Self:
        names = [file.path for file in self.files]
        if len({name.lower() for name in names}) != len(names):
            raise ValueError("files must have different names")
        if GENAI_CONFIG not in names:
            raise ValueError(f"files must have a {GENAI_CONFIG}")
        return self

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


class ReleaseVariant(_Object):
    """A variant of a release, by the digest of its manifest."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    manifest_digest: Sha256
    device_class: str = Field(default="", pattern=DEVICE_CLASS)
    """The class that it was judged for; empty for the machine of the gate's measurements."""


class Gate(_Object):
    """The verdict that let the release pass."""

    verdict: Literal["pass"]
    reason: str = Field(max_length=MAX_REASON)
    verdict_digest: Sha256
    """Digest of the verdict artifact."""


class Ancestor(_Object):
    """One artifact that the release descends from."""

    kind: Kind
    digest: Sha256
    step: str = Field(max_length=100)
    parents: tuple[Sha256, ...] = Field(strict=False, max_length=100)


class Release(_Stored):
    """What a channel points to: variants in order of preference, where they come from, and what they were judged by."""

    schema_version: Literal[1] = 1
    variants: tuple[ReleaseVariant, ...] = Field(strict=False, min_length=1, max_length=64)
    gate: Gate
    lineage: tuple[Ancestor, ...] = Field(strict=False, max_length=1000)
    evidence: tuple[EvidenceFile, ...] = Field(default=(), strict=False, max_length=2)


class Channel(_Stored):
    """Which release the nodes of one pool should run."""

    schema_version: Literal[1] = 1
    release_digest: Sha256
    sequence: int = Field(ge=1, le=1 << 53)
    """Rises with every change; a node never goes back to a lower one."""


Stored = TypeVar("Stored", bound=_Stored)


def blob_key(digest: str) -> str:
    return f"v1/blobs/sha256/{digest[:2]}/{digest}"


def manifest_key(digest: str) -> str:
    return f"v1/manifests/sha256/{digest}.json"


def release_key(digest: str) -> str:
    return f"v1/releases/sha256/{digest}.json"


def parse(kind: type[Stored], data: bytes, where: str) -> Stored:
    """Read an object strictly.

    Raises:
        DataError: it is not what `kind` allows.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise DataError(f"{where} is refused: {explain(error, kind.__name__)}; publish again") from None


def read_verified(store: Store, kind: type[Stored], key: str, digest: str) -> Stored:
    """Read a content-addressed object and check its digest before anything looks into it.

    Raises:
        CorruptDownload: the bytes do not match `digest`.
        DataError: they match, and still are not what `kind` allows.
    """
    data = store.read(key, MAX_OBJECT_BYTES)
    if hashlib.sha256(data).hexdigest() != digest:
        raise CorruptDownload(f"{store.uri}: {key} does not have the digest in its name; try again, or publish again")
    return parse(kind, data, f"{store.uri}: {key}")


def refuse_native_code(genai_config: bytes, where: str) -> None:
    """ONNX Runtime GenAI loads a shared library that its settings name; no settings of a release may name one.

    Raises:
        DataError: they do, or they are no JSON object.
    """

    def check_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, _ in pairs:
            if key.lower() == "custom_ops_library":
                raise DataError(f"{where} names a custom_ops_library, which is native code; remove that key")
        return dict(pairs)

    if len(genai_config) > MAX_GENAI_CONFIG_BYTES:
        raise DataError(f"{where} has more than {MAX_GENAI_CONFIG_BYTES:,} bytes; build the variant again")
    try:
        settings = json.loads(genai_config, object_pairs_hook=check_keys)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is not JSON; build the variant again") from None
    if not isinstance(settings, dict):
        raise DataError(f"{where} is no JSON object; build the variant again")
