"""`slmops new`: what it writes runs at once and passes the checks that every step has to pass."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.errors import ConfigError
from slmops.kubeflow.generate import checkout
from slmops.kubeflow.scaffold import scaffold

PACKAGES = {"slmops": "src/slmops", "slmops_components": "components", "slmops_pipelines": "pipelines"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the checkout whose packages are found before the installed ones."""
    copied = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("src", "components", "pipelines", "tests"):
        shutil.copytree(checkout() / folder, copied / folder, ignore=ignore)
    shutil.copy(checkout() / "pyproject.toml", copied)
    (copied / "packages").mkdir()
    for name, folder in PACKAGES.items():
        (copied / "packages" / name).symlink_to(copied / folder)
    return copied


def _python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(tree / "packages")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )


def test_a_new_step_passes_its_own_test_and_the_checks_of_all_steps(tree: Path) -> None:
    made = _python(tree, "-m", "slmops.cli", "new", "prune_rows", "--category", "data_processing")
    assert made.returncode == 0, made.stderr
    assert (tree / "components/data_processing/prune_rows/component.yaml").is_file()
    assert "prune_rows" in (tree / "docs/reference/components.md").read_text()
    assert all(Path(path).is_file() for path in made.stdout.split())
    assert "data_processing/__init__.py" not in made.stdout, "it was there before"

    tests = ["tests/unit/test_prune_rows.py", "tests/components/test_components.py", "tests/components/test_layers.py"]
    ran = _python(tree, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *tests)

    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "prune_rows" in _python(tree, "-m", "pytest", "--co", "-q", "--noconftest", tests[1]).stdout


def test_nothing_is_overwritten(tree: Path) -> None:
    before = (tree / "src/slmops/gate/run.py").read_text()
    ran = _python(tree, "-m", "slmops.cli", "new", "gate", "--category", "training")
    assert ran.returncode == 2
    assert "exists already; choose another name" in ran.stderr
    assert (tree / "src/slmops/gate/run.py").read_text() == before
    assert not (tree / "components/training/gate").exists()


@pytest.mark.parametrize(
    ("step", "category"), [("Prune", "training"), ("../prune", "training"), ("", "training"), ("prune", "a/b")]
)
def test_a_bad_name_is_refused(step: str, category: str) -> None:
    with pytest.raises(ConfigError, match="must be lowercase words joined by _"):
        scaffold(step, category)
