"""Entry points of Argo CD and Flux: both sync the same parts, in an order that works."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import pytest

from tests.manifests.conftest import Rendered
from tests.manifests.rendering import CHECKOUT, Resource, targets

CLUSTERS = sorted(path.name for path in (CHECKOUT / "manifests" / "clusters").iterdir())


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_argo_cd_and_flux_sync_the_same_parts_and_all_exist(rendered: Rendered, cluster: str) -> None:
    argo_cd = {path for path, _ in argo_cd_parts(rendered, cluster)}
    flux = {path for path, _ in flux_parts(rendered, cluster).values()}

    assert argo_cd == flux
    assert argo_cd <= set(targets(CHECKOUT))
    assert {f"manifests/overlays/{cluster}", f"manifests/clusters/{cluster}/edge"} <= argo_cd


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_pools_come_after_their_namespace(rendered: Rendered, cluster: str) -> None:
    namespace = f"manifests/clusters/{cluster}/edge"
    steps = dict(argo_cd_parts(rendered, cluster))
    flux = flux_parts(rendered, cluster)

    for path in steps:
        if PurePath(path).parts[:2] == ("manifests", "edge"):
            assert steps[path] > steps[namespace]
            depends_on = next(names for found, names in flux.values() if found == path)
            assert namespace in {flux[name][0] for name in depends_on}


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_argo_cd_project_allows_what_the_parts_need_and_no_more(rendered: Rendered, cluster: str) -> None:
    resources = rendered(f"manifests/clusters/{cluster}/argocd")
    project = one(resources, "AppProject").content["spec"]
    parts = [r for path, _ in argo_cd_parts(rendered, cluster) for r in rendered(path)]

    allowed = {(entry["group"], entry["kind"]) for entry in project["clusterResourceWhitelist"]}
    used = {(r.content["apiVersion"].rpartition("/")[0], r.kind) for r in parts if not r.namespace}
    places = {entry["namespace"] for entry in project["destinations"]}
    repositories = {source["repoURL"] for source in sources(resources)}

    assert used == allowed
    assert places == {r.namespace for r in parts if r.namespace}
    assert set(project["sourceRepos"]) == repositories


def argo_cd_parts(rendered: Rendered, cluster: str) -> list[tuple[str, int]]:
    """(path, step) of every application; lower steps come first."""
    resources = rendered(f"manifests/clusters/{cluster}/argocd")
    parts = [(one(resources, "Application").content["spec"]["source"]["path"], 0)]
    spec = one(resources, "ApplicationSet").content["spec"]
    steps = [step["matchExpressions"][0]["values"][0] for step in spec["strategy"]["rollingSync"]["steps"]]
    elements = spec["generators"][0]["list"]["elements"]
    return parts + [(element["path"], steps.index(element["step"])) for element in elements]


def flux_parts(rendered: Rendered, cluster: str) -> dict[str, tuple[str, list[str]]]:
    """Name → (path, names that it depends on)."""
    return {
        resource.name: (
            resource.content["spec"]["path"].removeprefix("./"),
            [entry["name"] for entry in resource.content["spec"].get("dependsOn", ())],
        )
        for resource in rendered(f"manifests/clusters/{cluster}/flux")
        if resource.kind == "Kustomization"
    }


def sources(resources: list[Resource]) -> list[dict[str, Any]]:
    application, template = one(resources, "Application"), one(resources, "ApplicationSet")
    return [application.content["spec"]["source"], template.content["spec"]["template"]["spec"]["source"]]


def one(resources: list[Resource], kind: str) -> Resource:
    found = [resource for resource in resources if resource.kind == kind]
    assert len(found) == 1
    return found[0]
