"""Which variants this machine can run, and which of a release a node like it takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata

from slmops import memory
from slmops.device_classes import cpu_features, missing_features, this_architecture
from slmops.errors import DataError
from slmops.release.format import Manifest, Release, Requirements, manifest_key, read_verified
from slmops.storage import Store


@dataclass(frozen=True)
class Machine:
    """What a variant's requirements are held against."""

    architecture: str
    runtime_version: str | None
    """Of onnxruntime-genai; None if it is not installed."""
    ram_bytes: int
    """What processes may use: physical memory, or less where a container has a limit."""
    features: frozenset[str] = frozenset()
    """Of its processor, in the kernel's names."""
    execution_providers: frozenset[str] = frozenset({"cpu"})
    """What its runtime can run on."""

    def unmet(self, requirements: Requirements) -> list[str]:
        """Why this machine cannot run a variant; empty if it can."""
        reasons = []
        if self.architecture not in requirements.architectures:
            wanted = " or ".join(requirements.architectures)
            reasons.append(f"needs {wanted}, this machine is {self.architecture}")
        if missing := missing_features(requirements.instruction_sets, self.features):
            reasons.append(f"needs a processor with {', '.join(missing)}")
        if requirements.execution_provider not in self.execution_providers:
            reasons.append(
                f"needs {requirements.execution_provider}, this runtime has {', '.join(self.execution_providers)}"
            )
        if self.runtime_version is None:
            reasons.append(f"needs onnxruntime-genai {requirements.runtime_version}, none is installed")
        elif _parts(self.runtime_version) < _parts(requirements.runtime_version):
            reasons.append(f"needs onnxruntime-genai {requirements.runtime_version}, found {self.runtime_version}")
        if self.ram_bytes < requirements.ram_bytes:
            reasons.append(f"needs {requirements.ram_bytes:,} bytes of memory, found {self.ram_bytes:,}")
        return reasons


def this_machine() -> Machine:
    try:
        runtime_version = metadata.version("onnxruntime-genai")
    except metadata.PackageNotFoundError:
        runtime_version = None
    ram_bytes = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), memory.limit_bytes())
    return Machine(this_architecture(), runtime_version, ram_bytes, cpu_features())


def choose(store: Store, release: Release, machine: Machine) -> Manifest | list[str]:
    """The first variant of `release` whose requirements `machine` meets; if none, why not, a line for each.

    Raises:
        CorruptDownload, DataError: a manifest is not what the release names.
    """
    refusals = []
    for variant in release.variants:
        key = manifest_key(variant.manifest_digest)
        manifest = read_verified(store, Manifest, key, variant.manifest_digest)
        if manifest.variant != variant.name:
            raise DataError(f"{store.uri}: {key} is of variant {manifest.variant}, not {variant.name}; publish again")
        unmet = machine.unmet(manifest.requirements)
        if not unmet:
            return manifest
        refusals.append(f"{variant.name}: {', '.join(unmet)}")
    return refusals


def _parts(version: str) -> tuple[int, ...]:
    """`0.18.1.dev3` → (0, 18, 1): the release's own numbers, which is all that requirements name."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    while numbers and numbers[-1] == 0:  # 0.18 and 0.18.0 are one version
        numbers.pop()
    return tuple(numbers)
