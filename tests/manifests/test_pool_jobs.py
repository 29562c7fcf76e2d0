"""The Job by which benchmark measures on a node of an edge pool, among what a cluster has: no Git holds it."""

from __future__ import annotations

from typing import Any

import pytest

from slmops.benchmark.config import BenchmarkConfig
from slmops.device_classes import read_device_classes
from slmops.kubeflow.pool_job import PoolJob
from tests.manifests import policies, validation
from tests.manifests.conftest import Rendered
from tests.manifests.rendering import CHECKOUT, Resource

CLASSES = read_device_classes(CHECKOUT / "manifests" / "edge" / "device-classes.yaml")
OVERLAYS = ("dev", "staging", "production")


def job_for(device_class: str) -> Resource:
    """With the step's own defaults, in the namespace of the steps, which create it."""
    job = PoolJob(
        name="slmops-measure-0",
        pool="berlin",
        device_class=CLASSES[device_class],
        image=f"registry.example/slmops/edge@sha256:{'0' * 64}",
        store_uri="s3://slmops-staging/releases",
        store_secret=BenchmarkConfig().store_secret,
        manifest_digest="0" * 64,
        task="",
        pending_timeout_s=600,
        timeout_s=1800,
    ).manifest()
    return Resource("job", job | {"metadata": job["metadata"] | {"namespace": "slmops"}})


@pytest.mark.parametrize("device_class", CLASSES)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_keeps_to_every_policy_and_what_it_refers_to_is_there(
    rendered: Rendered, overlay: str, device_class: str
) -> None:
    job = job_for(device_class)
    resources = [*rendered(f"manifests/overlays/{overlay}"), job]

    found = [finding for policy in policies.POLICIES for finding in policy(resources) if finding.resource is job]

    assert not [*found, *validation.check(job)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_its_pod_reaches_names_and_the_store_and_nothing_else(rendered: Rendered, overlay: str) -> None:
    """It runs on a device in the field, which is no part of the cluster that anything else is opened for."""
    resources = rendered(f"manifests/overlays/{overlay}")
    of_job = job_for("x86-avx2").content["spec"]["template"]["metadata"]["labels"]
    of_step = {"pipelines.kubeflow.org/v2_component": "true"}

    assert flows(resources, of_job) == {"default-deny", "allow-dns", "allow-object-store"}
    assert flows(resources, of_step) > flows(resources, of_job) | {"allow-kubernetes-api", "allow-teacher-endpoint"}


@pytest.mark.parametrize("overlay", ["staging", "production"])
def test_its_keys_are_neither_those_that_write_nor_those_of_the_pools_servers(rendered: Rendered, overlay: str) -> None:
    secrets = [
        resource
        for target in (f"manifests/overlays/{overlay}", f"manifests/clusters/{overlay}/edge")
        for resource in rendered(target)
        if resource.kind == "ExternalSecret"
    ]
    entries = {(r.namespace, r.name): r.content["spec"]["dataFrom"][0]["extract"]["key"] for r in secrets}

    own = entries.pop(("slmops", BenchmarkConfig().store_secret))

    assert ("slmops-edge", "slmops-release-reader") in entries
    assert own not in entries.values()


def flows(resources: list[Resource], labels: dict[str, str]) -> set[str]:
    """The network policies of `slmops` that are about a pod with these labels."""
    return {
        resource.name
        for resource in resources
        if resource.kind == "NetworkPolicy"
        and resource.namespace == "slmops"
        and selects(resource.content["spec"]["podSelector"], labels)
    }


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """As the API server has it: an absent label is NotIn any values."""
    meets = {
        "In": lambda key, values: labels.get(key) in values,
        "NotIn": lambda key, values: labels.get(key) not in values,
        "Exists": lambda key, values: key in labels,
        "DoesNotExist": lambda key, values: key not in labels,
    }
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        meets[each["operator"]](each["key"], each.get("values")) for each in selector.get("matchExpressions", ())
    )
