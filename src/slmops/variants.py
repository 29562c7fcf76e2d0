"""Which directory a step means by a model artifact and a variant's name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slmops import artifacts, models
from slmops.artifacts import SIDECAR, Sidecar
from slmops.errors import ConfigError


@dataclass(frozen=True)
class ModelFiles:
    """A model that can be run, and what it is known by."""

    directory: Path
    variant: str
    quantized: bool
    digest: str
    """The Hugging Face directory's digest, or the variant's own."""
    size_bytes: int
    sidecar: Sidecar
    """Of the artifact that holds it."""
    execution_provider: str = "cpu"
    """What a quantized variant was built for; a Hugging Face directory runs on what there is."""


def find_model(artifact: Path, variant: str) -> ModelFiles:
    """The model that `variant` names in an artifact: `full_precision` is a Hugging Face directory itself.

    Raises:
        ArtifactError: the artifact is missing or half-written.
        ConfigError: it holds no such variant.
    """
    if variant == models.FULL_PRECISION:
        sidecar = models.open_model(artifact)
        size = sum(entry.size_bytes for entry in sidecar.files)
        return ModelFiles(artifact, variant, False, sidecar.digest, size, sidecar)
    sidecar = artifacts.expect(artifact, "variants")
    known = sidecar.facts["variants"]
    if variant not in known:
        raise ConfigError(f"{artifact / SIDECAR} lists no variant {variant!r}; it holds {', '.join(sorted(known))}")
    found = known[variant]
    provider = found.get("execution_provider", "cpu")
    return ModelFiles(artifact / variant, variant, True, found["digest"], found["size_bytes"], sidecar, provider)
