"""Pools and device classes: a pool is a name and a class, and everything else follows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from slmops.device_classes import DeviceClass, read_device_classes
from slmops.errors import ConfigError
from slmops.kubeflow import manifests
from slmops.kubeflow.manifests import placement
from tests.manifests import validation
from tests.manifests.conftest import Rendered
from tests.manifests.rendering import CHECKOUT, Resource, pinned_copy, render

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


def test_the_namespace_lets_in_every_device_class(rendered: Rendered) -> None:
    limits = next(r for r in rendered("manifests/clusters/production/edge") if r.kind == "LimitRange")
    largest = {entry["type"]: entry["max"] for entry in limits.content["spec"]["limits"]}

    for name, device_class in read_device_classes(EDGE / "device-classes.yaml").items():
        assert device_class.num_cpus <= int(largest["Container"]["cpu"]), name
        assert device_class.ram_mib <= int(largest["Container"]["memory"].removesuffix("Gi")) * 1024, name
        assert device_class.disk_mib <= int(largest["PersistentVolumeClaim"]["storage"].removesuffix("Gi")) * 1024, name


def test_pools_are_of_different_kinds() -> None:
    kinds = {(class_of(pool).architecture, class_of(pool).execution_provider) for pool in POOLS}

    assert kinds >= {("x86_64", "cpu"), ("aarch64", "cpu"), ("x86_64", "cuda")}


def test_every_pool_gets_what_is_published_for_it(rendered: Rendered) -> None:
    jobs = [r for r in rendered("manifests/overlays/production") if r.kind == "CronJob" and r.name == "promote"]
    arguments = jobs[0].content["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]

    assert {argument.removeprefix("--channel=") for argument in arguments if "--channel=" in argument} == set(POOLS)


def test_a_pool_is_added_as_the_guide_says(tmp_path: Path) -> None:
    """With the very texts of docs/guide/add-a-pool.md."""
    guide = (CHECKOUT / "docs" / "guide" / "add-a-pool.md").read_text()
    declared, kustomization = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    root = pinned_copy(tmp_path)
    edge = root / "manifests" / "edge"
    with open(edge / "device-classes.yaml", "a") as file:
        file.write(declared)
    manifests.write(root)
    (edge / "pools" / "berlin").mkdir()
    (edge / "pools" / "berlin" / "kustomization.yaml").write_text(kustomization)

    daemon_set, service = daemon_set_and_service(render(root, "manifests/edge/pools/berlin"))

    assert daemon_set.name == service.name == "edge-berlin"
    assert not validation.check(daemon_set)
    pod = daemon_set.content["spec"]["template"]["spec"]
    assert pod["nodeSelector"].items() >= {"slmops/pool": "berlin", "kubernetes.io/arch": "arm64"}.items()
    assert pod["containers"][0]["resources"]["limits"]["memory"] == "768Mi"
    claim = next(volume for volume in pod["volumes"] if volume["name"] == "releases")["ephemeral"]
    assert claim["volumeClaimTemplate"]["spec"]["storageClassName"] == "local-nvme"
    assert claim["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"] == "2048Mi"


def test_an_object_store_outside_is_allowed_as_the_guide_says(pinned: Path) -> None:
    """With the very text of docs/guide/install.md."""
    guide = (CHECKOUT / "docs" / "guide" / "install.md").read_text()
    patch = next(text for text in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL) if "allow-object-store" in text)
    overlay = pinned / "tests" / "manifests" / "guide"
    overlay.mkdir()
    head = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
    (overlay / "kustomization.yaml").write_text(f"{head}resources: [../../../manifests/overlays/production]\n{patch}")

    resources = render(pinned, "tests/manifests/guide")

    flows = [r for r in resources if r.kind == "NetworkPolicy" and r.name == "allow-object-store"]
    assert {flow.namespace for flow in flows} == {"slmops", "slmops-publish"}
    assert all(f.content["spec"]["egress"][0]["to"] == [{"ipBlock": {"cidr": "203.0.113.0/28"}}] for f in flows)


def test_every_pool_is_in_some_cluster() -> None:
    files = (CHECKOUT / "manifests" / "clusters").glob("*/flux/parts.yaml")
    text = "".join(path.read_text() for path in files)

    assert [pool for pool in POOLS if f"path: ./manifests/edge/pools/{pool}\n" not in text] == []


def test_a_wrong_device_class_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "device-classes.yaml"
    declared = yaml.safe_load((EDGE / "device-classes.yaml").read_text())["x86-avx2"]
    file.write_text(yaml.safe_dump({"odd": declared | {"architecture": "riscv64", "ram_mib": 1, "ram_gib": 1}}))

    with pytest.raises(ConfigError) as refused:
        read_device_classes(file)

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
    return read_device_classes(EDGE / "device-classes.yaml")[name]


def daemon_set_and_service(resources: list[Resource]) -> tuple[Resource, Resource]:
    by_kind: dict[str, Resource] = {resource.kind: resource for resource in resources}
    assert by_kind.keys() == {"DaemonSet", "Service"}
    return by_kind["DaemonSet"], by_kind["Service"]
