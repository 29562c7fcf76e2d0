"""Pools and device classes: a pool is a name and a class, and everything else follows."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from slmops.errors import ConfigError
from slmops.kubeflow.manifests import DeviceClass, device_classes, placement
from tests.manifests.conftest import Rendered
from tests.manifests.rendering import CHECKOUT, Resource, render

EDGE = CHECKOUT / "manifests" / "edge"
POOLS = sorted(path.name for path in (EDGE / "pools").iterdir())


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_has_one_name_everywhere(rendered: Rendered, pool: str) -> None:
    """Its folder, its objects, its nodes, and the channel that it follows."""
    daemon_set, service = daemon_set_and_service(rendered(f"manifests/edge/pools/{pool}"))
    template = daemon_set.content["spec"]["template"]

    assert daemon_set.name == service.name == f"edge-{pool}"
    assert template["metadata"]["labels"].items() >= service.content["spec"]["selector"].items()
    assert service.content["spec"]["selector"]["slmops/pool"] == pool
    assert template["spec"]["nodeSelector"]["slmops/pool"] == pool
    pull = template["spec"]["initContainers"][0]
    channel = next(entry for entry in pull["env"] if entry["name"] == "CHANNEL")
    assert channel["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['slmops/pool']"
    assert '--channel="$CHANNEL"' in pull["args"][0]


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_has_what_its_device_class_says(rendered: Rendered, pool: str) -> None:
    device_class = class_of(pool)
    pod = daemon_set_and_service(rendered(f"manifests/edge/pools/{pool}"))[0].content["spec"]["template"]["spec"]
    pull, serve = pod["initContainers"][0], pod["containers"][0]
    claim = next(volume for volume in pod["volumes"] if volume["name"] == "releases")["ephemeral"]

    assert (
        pod["nodeSelector"]["kubernetes.io/arch"] == {"x86_64": "amd64", "aarch64": "arm64"}[device_class.architecture]
    )
    assert serve["resources"]["limits"]["memory"] == f"{device_class.ram_mib}Mi"
    # `pull` takes the first variant that fits the memory that it sees itself: it must see what `serve` will have.
    assert pull["resources"]["limits"]["memory"] == serve["resources"]["limits"]["memory"]
    assert claim["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"] == f"{device_class.disk_mib}Mi"
    assert ("nvidia.com/gpu" in serve["resources"]["limits"]) == (device_class.execution_provider == "cuda")


@pytest.mark.parametrize(("exit_code", "has_release", "expected"), [(0, False, 0), (75, True, 0), (75, False, 1)])
def test_a_node_that_cannot_fetch_serves_what_it_has(
    rendered: Rendered, tmp_path: Path, exit_code: int, has_release: bool, expected: int
) -> None:
    """The real shell command of the init container; in the place of `slmops`, a program that ends as told."""
    daemon_set, _ = daemon_set_and_service(rendered("manifests/edge/pools/x86-cpu"))
    pull = daemon_set.content["spec"]["template"]["spec"]["initContainers"][0]
    root = tmp_path / "node"
    (root / "releases" / "digest").mkdir(parents=True)
    if has_release:
        (root / "current").symlink_to("releases/digest")
    program = tmp_path / "bin" / "slmops"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "edge pull --channel=berlin" ] && exit {exit_code}\nexit 3\n')
    program.chmod(0o755)
    command = [*pull["command"], *(arg.replace("/var/lib/slmops", str(root)) for arg in pull["args"])]
    environment = {"PATH": f"{program.parent}:/usr/bin:/bin", "STORE_URI": "s3://releases", "CHANNEL": "berlin"}

    assert subprocess.run(command, env=environment, timeout=10).returncode == expected


def test_pools_are_of_different_kinds() -> None:
    kinds = {(class_of(pool).architecture, class_of(pool).execution_provider) for pool in POOLS}

    assert kinds >= {("x86_64", "cpu"), ("aarch64", "cpu"), ("x86_64", "cuda")}


def test_every_pool_gets_what_is_published_for_it(rendered: Rendered) -> None:
    jobs = [r for r in rendered("manifests/overlays/production") if r.kind == "CronJob" and r.name == "promote"]
    arguments = jobs[0].content["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]

    assert {argument.removeprefix("--channel=") for argument in arguments if "--channel=" in argument} == set(POOLS)


def test_adding_a_pool_takes_a_folder_with_a_name_and_a_class(pinned: Path) -> None:
    """As docs/guide/add-a-pool.md tells it."""
    folder = pinned / "manifests" / "edge" / "pools"
    text = (folder / "x86-cpu" / "kustomization.yaml").read_text()
    added = folder / "berlin" / "kustomization.yaml"
    added.parent.mkdir()
    added.write_text(text.replace("x86-cpu", "berlin").replace("x86-avx2", "arm64-dotprod"))

    daemon_set, service = daemon_set_and_service(render(pinned, "manifests/edge/pools/berlin"))

    assert daemon_set.name == service.name == "edge-berlin"
    selector = daemon_set.content["spec"]["template"]["spec"]["nodeSelector"]
    assert selector["slmops/pool"] == "berlin"
    assert selector["kubernetes.io/arch"] == "arm64"


def test_a_wrong_device_class_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "device-classes.yaml"
    declared = yaml.safe_load((EDGE / "device-classes.yaml").read_text())["x86-avx2"]
    file.write_text(yaml.safe_dump({"odd": declared | {"architecture": "riscv64", "ram_mib": 1, "ram_gib": 1}}))

    with pytest.raises(ConfigError) as refused:
        device_classes(file)

    message = str(refused.value)
    assert f"{file}: odd" in message
    for field in ("architecture", "ram_mib", "ram_gib"):
        assert field in message


def test_a_device_class_without_gpu_tolerates_and_asks_for_none() -> None:
    declared = yaml.safe_load((EDGE / "device-classes.yaml").read_text())["x86-avx2"]

    text = yaml.safe_dump(placement(DeviceClass.create(declared)))

    assert "nvidia" not in text


def class_of(pool: str) -> DeviceClass:
    components = yaml.safe_load((EDGE / "pools" / pool / "kustomization.yaml").read_text())["components"]
    name = next(Path(path).name for path in components if "/classes/" in path)
    return device_classes(EDGE / "device-classes.yaml")[name]


def daemon_set_and_service(resources: list[Resource]) -> tuple[Resource, Resource]:
    by_kind: dict[str, Resource] = {resource.kind: resource for resource in resources}
    assert by_kind.keys() == {"DaemonSet", "Service"}
    return by_kind["DaemonSet"], by_kind["Service"]
