"""Writes what below manifests/ follows from other files: which images, and a component per device class."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from slmops import __version__
from slmops.device_classes import DeviceClass, read_device_classes

NOTE = "# Written by `make compile` from {source}; change that instead.\n"
NOT_PINNED = "images are not pinned - run: make images REGISTRY=host/team"
"""Stands where a file's name would: kustomize, and with it Argo CD and Flux, refuses and shows it."""

_KUBERNETES_ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}


def write(root: Path) -> None:
    """Write all that is generated below `root`/manifests, except the pipelines.

    Raises:
        ConfigError: device-classes.yaml or digests.yaml is not what it must be.
    """
    manifests = root / "manifests"
    digests = (root / "images" / "digests.yaml").read_text()
    recorded = yaml.safe_load(digests)
    _write_component(manifests / "components" / "images", "images/digests.yaml", images(recorded))
    _write_component(manifests / "components" / "pinned-images", "images/digests.yaml", pinned_images(recorded))
    _write(manifests / "base" / "images.yaml", "images/digests.yaml", digests_for_pods(digests))
    declared = manifests / "edge" / "device-classes.yaml"
    classes = read_device_classes(declared)
    copy = NOTE.format(source="manifests/edge/device-classes.yaml") + yaml.safe_dump(
        yaml.safe_load(declared.read_text()), sort_keys=False
    )
    (root / "pipelines").mkdir(exist_ok=True)
    (root / "pipelines" / "device-classes.yaml").write_text(copy)
    for folder in (manifests / "edge" / "classes").glob("*"):
        if folder.name not in classes:
            shutil.rmtree(folder)
    for name, device_class in classes.items():
        _write_component(manifests / "edge" / "classes" / name, "../../device-classes.yaml", placement(device_class))


def images(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The names that the manifests use → registry and digest, or the version tag until there is a digest."""
    return {"images": [_image(recorded["registry"], *entry) for entry in recorded["digests"].items()]}


def pinned_images(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The same, if every image has a digest; else a component that cannot be built and says why."""
    return images(recorded) if all(recorded["digests"].values()) else {"resources": [NOT_PINNED]}


def digests_for_pods(digests: str) -> dict[str, Any]:
    """The file images/digests.yaml for a pod that compiles pipelines: its own image was built before the digests."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "slmops-images", "namespace": "slmops"},
        "data": {"digests.yaml": digests},
    }


def placement(device_class: DeviceClass) -> dict[str, Any]:
    """The component that puts the pods of a pool onto nodes of a class, and sizes them."""
    memory = f"{device_class.ram_mib}Mi"
    labels = {"kubernetes.io/arch": _KUBERNETES_ARCHITECTURE[device_class.architecture]}
    labels |= {f"feature.node.kubernetes.io/cpu-cpuid.{name}": "true" for name in device_class.instruction_sets}
    pod: dict[str, Any] = {"nodeSelector": labels}
    serve = {
        "requests": {"cpu": "1", "memory": memory},
        "limits": {"cpu": str(device_class.num_cpus), "memory": memory},
    }
    if device_class.execution_provider == "qnn":
        labels["slmops/npu"] = "qnn"  # nothing discovers NPUs: whoever adds the node says what it has
    if device_class.execution_provider == "cuda":
        labels["nvidia.com/gpu.present"] = "true"
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        for amounts in serve.values():
            amounts["nvidia.com/gpu"] = "1"
    # `pull` chooses the variant by the memory that it finds, so it gets what the server gets.
    pull = {"requests": {"memory": memory}, "limits": {"memory": memory}}
    pod["initContainers"] = [{"name": "pull", "resources": pull}]
    pod["containers"] = [{"name": "serve", "resources": serve}]
    claim = {"spec": {"resources": {"requests": {"storage": f"{device_class.disk_mib}Mi"}}}}
    pod["volumes"] = [{"name": "releases", "ephemeral": {"volumeClaimTemplate": claim}}]
    patch = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "edge", "namespace": "slmops-edge"},
        "spec": {"template": {"spec": pod}},
    }
    target = {"kind": "DaemonSet", "name": "edge"}
    return {"patches": [{"target": target, "patch": yaml.safe_dump(patch, sort_keys=False)}]}


def _image(registry: str | None, image: str, digest: str | None) -> dict[str, str]:
    name = f"slmops/{image}"
    entry = {"name": name, "newName": f"{registry}/{name}" if registry else name}
    return entry | ({"digest": digest} if digest else {"newTag": __version__})


def _write_component(folder: Path, source: str, content: Mapping[str, Any]) -> None:
    head = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component"}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "kustomization.yaml", source, {**head, **content})


def _write(path: Path, source: str, content: Mapping[str, Any]) -> None:
    path.write_text(NOTE.format(source=source) + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120))


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, so that a patch is read as one."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
