"""A quantized variant ready to be exported, and a registry to export it to."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmops.packaging.foundry import write_inference_model
from tests.packaging.registries import RegistryServer, docker_registry


@pytest.fixture
def variant(tiny_variants: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's int4 variant, with what Foundry Local wants."""
    directory = tmp_path / "cpu-int4"
    shutil.copytree(tiny_variants / "cpu-int4", directory)
    write_inference_model(directory, "tiny-cpu-int4")
    return directory


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine's own logins stay out of the tests."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ORAS_USER", raising=False)
    monkeypatch.delenv("ORAS_PASS", raising=False)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture
def target(registry: RegistryServer, request: pytest.FixtureRequest) -> str:
    """A name of its own for each test."""
    return f"{registry.host}/models/{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}:v1"
