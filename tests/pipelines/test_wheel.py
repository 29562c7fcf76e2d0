"""The wheel holds all that the command needs: it compiles as a checkout does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from slmops.kubeflow import registry
from slmops.kubeflow.generate import checkout

SOURCES = ("src", "components", "images", "pipelines", "manifests")
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, unpacked where Python finds it before the checkout."""
    root, folder = checkout(), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(root / name, folder / "source" / name, ignore=leave)
    for name in FILES:
        shutil.copy(root / name, folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run([*build, str(folder / "source")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with zipfile.ZipFile(next(folder.glob("slmops-*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def from_wheel(unpacked: Path, *command: str) -> str:
    """What Python prints with the wheel in front, far from the checkout."""
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    run = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=unpacked.parent, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_the_wheel_is_what_runs(unpacked: Path) -> None:
    code = "import slmops, slmops_components, slmops_pipelines as p; print(*(m.__path__[0] for m in (slmops, p)))"
    assert all(path.startswith(str(unpacked)) for path in from_wheel(unpacked, "-c", code).split())


@pytest.mark.parametrize("pipeline", registry.names())
def test_it_compiles_to_the_same_bytes_as_a_checkout(unpacked: Path, pipeline: str) -> None:
    stored = checkout() / "pipelines" / "compiled" / f"{pipeline}.yaml"
    from_wheel(unpacked, "-m", "slmops.cli", "compile", pipeline, "--output", f"{pipeline}.yaml")
    assert (unpacked.parent / f"{pipeline}.yaml").read_bytes() == stored.read_bytes()
    assert (unpacked / "slmops_pipelines" / "compiled" / f"{pipeline}.yaml").read_bytes() == stored.read_bytes()


def test_it_has_every_file_that_is_not_python(unpacked: Path) -> None:
    """Templates, style sheets, component.yaml and metadata: what a packaging rule may forget."""
    packages = {"src/slmops": "slmops", "components": "slmops_components", "pipelines": "slmops_pipelines"}
    for source, package in packages.items():
        for path in (checkout() / source).rglob("*"):
            if path.is_file() and path.suffix not in {".py", ".pyc"}:
                assert (unpacked / package / path.relative_to(checkout() / source)).is_file(), path
