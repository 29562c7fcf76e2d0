"""Device classes: the kinds of device that edge pools are made of, strictly read from one file."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator

from slmops.config import Config
from slmops.errors import ConfigError, explain_os_errors

Architecture = Literal["aarch64", "x86_64"]
ExecutionProvider = Literal["cpu", "cuda", "qnn"]

CLASS_NAME = r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$"
MAX_CLASSES = 64
MAX_FILE_BYTES = 1 << 20

NOT_BUILDABLE: dict[str, str] = {
    "qnn": "a model for this NPU is compiled with Qualcomm's SDK, which no image here holds; build it where that SDK "
    "is, or declare the class as cpu"
}
"""Execution providers that a class may declare and no variant can be built for, and why."""

CPUINFO_NAMES = {"avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16", "avxvnni": "avx_vnni"}
"""Features as Node Feature Discovery names them, in lower case → as /proc/cpuinfo does, where the two differ."""

_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


def _whole(value: object) -> object:
    """4.0 → 4: all numbers of an object that is a parameter of KFP arrive as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class DeviceClass(Config):
    """A kind of edge device: what it has, and what a model has to reach on it."""

    model_config = ConfigDict(strict=True)

    architecture: Architecture
    """As a variant's requirements name it."""
    instruction_sets: list[str] = Field(min_length=1, max_length=32)
    """Features that the CPU must have, as Node Feature Discovery labels them."""
    execution_provider: ExecutionProvider
    """`cpu`; `cuda`: the pod gets one NVIDIA GPU; `qnn`: an NPU of Qualcomm's."""
    num_cpus: Whole = Field(ge=1, le=256)
    """Cores for the server, which are its threads."""
    ram_mib: Whole = Field(ge=256, le=1 << 20)
    """Memory limit of the pod; a variant that needs more is not taken."""
    disk_mib: Whole = Field(ge=256, le=1 << 24)
    """The node's cache: two releases and the one that is being fetched."""
    context_length: Whole = Field(ge=32, le=1 << 20)
    """Tokens that a prompt and its answer may have together."""
    time_to_first_token_ms_p95: float = Field(gt=0, le=3_600_000)
    """What the first token may take."""
    latency_ms_p95: float = Field(gt=0, le=3_600_000)
    """What a whole answer may take."""
    tokens_per_s: float = Field(gt=0, le=1_000_000)
    """Least decoding speed of one stream."""
    min_accuracy_kept: float = Field(ge=0, le=2)
    """Quality floor: least accuracy over the teacher's, by the lower bound of its paired interval."""

    @field_validator("instruction_sets")
    @classmethod
    def _are_features(cls, names: list[str]) -> list[str]:
        for name in names:
            if not re.fullmatch(r"[A-Z0-9_]{1,32}", name):
                raise ValueError(f"{name!r:.40} is no feature as Node Feature Discovery labels it, such as AVX2")
        return names

    def missing_features(self, features: frozenset[str]) -> list[str]:
        """Those of `instruction_sets` that are not among a machine's `cpu_features`."""
        return missing_features(self.instruction_sets, features)


def read_device_classes(path: Path) -> dict[str, DeviceClass]:
    """All classes of a file, by name.

    Raises:
        ConfigError: the file or one of its classes is not what it may be; with every problem of a class.
    """
    with explain_os_errors(path), open(path, "rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than the {MAX_FILE_BYTES:,} bytes that are read; give a file of classes")
    return parse_device_classes(_read_yaml(data, path), str(path))


def _read_yaml(data: bytes, path: Path) -> Any:
    """YAML in which no key is there twice; PyYAML alone keeps the last one, and the class before it is gone.

    Raises:
        ConfigError: it is none.
    """
    import yaml  # a node that gets its class as JSON has no YAML reader

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            for key, count in Counter(str(key.value) for key, _ in node.value).items():
                if count > 1:
                    raise yaml.MarkedYAMLError(problem=f"{key} is there twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(data, Loader)  # noqa: S506 - it is a safe one
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None


def parse_device_classes(declared: Any, where: str) -> dict[str, DeviceClass]:
    """Classes by name, out of what a file or a parameter holds.

    Raises:
        ConfigError: one of them is not what a class may be.
    """
    if not isinstance(declared, dict) or not 1 <= len(declared) <= MAX_CLASSES:
        raise ConfigError(f"{where} must hold 1 to {MAX_CLASSES} device classes by name")
    classes = {}
    for name, fields in declared.items():
        if not isinstance(name, str) or not re.fullmatch(CLASS_NAME, name):
            raise ConfigError(f"{where}: {name!r:.60} is no name of a class: lower-case letters, digits and -")
        if not isinstance(fields, dict):
            raise ConfigError(f"{where}: {name} must have fields such as architecture, got {fields!r:.40}")
        try:
            classes[name] = DeviceClass.create(fields)
        except ConfigError as error:
            raise ConfigError(f"{where}: {name}: {error}") from None
    return classes


def _checked(declared: dict[str, Any]) -> dict[str, Any]:
    try:
        return declared and {name: each.model_dump() for name, each in parse_device_classes(declared, "here").items()}
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("here: ")) from None


DeviceClasses = Annotated[dict[str, Any], AfterValidator(_checked)]
"""A setting of a step: device classes by name with their fields, as `parse_device_classes` takes them; may be empty."""


def missing_features(instruction_sets: Sequence[str], features: frozenset[str]) -> list[str]:
    """Those of `instruction_sets` that are not among a machine's `cpu_features`."""
    names = {name: CPUINFO_NAMES.get(name.lower(), name.lower()) for name in instruction_sets}
    return [name for name, found in names.items() if found not in features]


def this_architecture() -> str:
    """`x86_64` or `aarch64`, or what another machine calls itself."""
    name = platform.machine().lower()
    return _ARCHITECTURES.get(name, name)


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The features of this machine's processor, in the kernel's lower-case names; empty where it does not tell."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()
