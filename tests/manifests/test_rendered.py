"""Everything that somebody applies, held against the schemas of its kinds and against the policies."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from slmops.cli import app
from slmops.kubeflow.manifests import NOT_PINNED
from tests.manifests import policies, validation
from tests.manifests.conftest import Rendered
from tests.manifests.rendering import CHECKOUT, Finding, RenderError, render, targets

MANIFESTS = CHECKOUT / "manifests"
OPTIONAL = [f"tests/manifests/optional/{path.name}" for path in Path(__file__).with_name("optional").iterdir()]
TARGETS = [*targets(CHECKOUT), *OPTIONAL]
POOLS = [target for target in TARGETS if target.startswith("manifests/edge/pools/")]
CLUSTERS = sorted(path.name for path in (MANIFESTS / "clusters").iterdir())
NAMESPACE_OF_POOLS = "manifests/clusters/production/edge"
"""What lies in a cluster before its pools come."""

needs_crds = pytest.mark.skipif(
    not validation.CRDS.is_dir(), reason=f"no custom resource definitions in {validation.CRDS}; set SLMOPS_CRDS"
)


@pytest.mark.parametrize("target", TARGETS)
def test_built_in_objects_fit_the_schemas_of_kubernetes(rendered: Rendered, target: str) -> None:
    objects = [resource for resource in rendered(target) if validation.is_built_in(resource.content["apiVersion"])]

    assert_none([finding for resource in objects for finding in validation.check(resource)])


@needs_crds
@pytest.mark.parametrize("target", TARGETS)
def test_custom_resources_fit_their_definitions(rendered: Rendered, target: str) -> None:
    objects = [resource for resource in rendered(target) if not validation.is_built_in(resource.content["apiVersion"])]

    assert_none([finding for resource in objects for finding in validation.check(resource)])


@pytest.mark.parametrize("policy", policies.POLICIES, ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("target", TARGETS)
def test_policy(rendered: Rendered, target: str, policy: policies.Policy) -> None:
    before = rendered(NAMESPACE_OF_POOLS) if target in POOLS else []

    assert_none([finding for finding in policy([*rendered(target), *before]) if finding.resource.target == target])


def test_every_kind_of_target_is_there() -> None:
    assert {"manifests/overlays/dev", "manifests/overlays/staging", "manifests/overlays/production"} <= set(TARGETS)
    assert len(POOLS) >= 3
    assert {
        f"manifests/clusters/{cluster}/{tool}" for cluster in CLUSTERS for tool in ("argocd", "edge", "flux")
    } <= set(TARGETS)


@pytest.mark.parametrize("target", ["manifests/overlays/staging", "manifests/overlays/production", *POOLS])
def test_unpinned_images_are_refused_with_the_command_that_pins_them(target: str) -> None:
    recorded = yaml.safe_load((CHECKOUT / "images" / "digests.yaml").read_text())
    if all(recorded["digests"].values()):
        assert render(CHECKOUT, target)
        return

    with pytest.raises(RenderError, match="make images REGISTRY=") as refused:
        render(CHECKOUT, target)

    assert NOT_PINNED in str(refused.value)


def test_a_dev_cluster_needs_no_registry() -> None:
    images = {
        container["image"]
        for pod in policies.pods(render(CHECKOUT, "manifests/overlays/dev"))
        for _, container in pod.containers()
    }

    assert images
    assert all(":" in image and not image.endswith(":latest") for image in images)


def test_every_component_is_in_some_target() -> None:
    """Otherwise nothing here would look at it."""
    files = [*MANIFESTS.glob("**/kustomization.yaml"), *CHECKOUT.glob("tests/manifests/optional/*/kustomization.yaml")]
    read = {path.parent.resolve(): yaml.safe_load(path.read_text()) for path in files}
    used = {(folder / entry).resolve() for folder, file in read.items() for entry in file.get("components", ())}

    components = {folder for folder, file in read.items() if file["kind"] == "Component"}
    # Device classes are all written by one function, and a class may have no pool yet.
    assert {folder for folder in components if folder.parent.name != "classes"} <= used


@pytest.mark.parametrize("target", ["manifests/overlays/production", *POOLS])
def test_commands_in_pods_are_commands_of_slmops(rendered: Rendered, target: str) -> None:
    """Parsed by the command's own parser: a misspelt option would else be found by a cluster, at night."""
    commands = [
        [*container["command"], *container["args"]]
        for pod in policies.pods(rendered(target))
        for _, container in pod.containers()
        if "command" in container
    ]

    assert commands
    for command in commands:
        words = shlex.split(command[2].partition("||")[0]) if command[:2] == ["sh", "-c"] else command
        assert words[0] == "slmops"
        parse(words[1:])


@pytest.mark.parametrize("overlay", ["dev", "staging", "production"])
def test_the_nightly_run_gives_its_pipeline_what_it_needs(rendered: Rendered, overlay: str) -> None:
    resources = rendered(f"manifests/overlays/{overlay}")
    nightly = next(r for r in resources if r.kind == "CronJob" and r.name == "nightly-retrain")
    container = nightly.content["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    pipeline = container["command"][2].replace("_", "-")
    versions = [r for r in resources if r.kind == "PipelineVersion" and r.content["spec"]["pipelineName"] == pipeline]
    parameters = versions[0].content["spec"]["pipelineSpec"]["root"]["inputDefinitions"]["parameters"]

    given = {arg.removeprefix("--set=").partition("=")[0] for arg in container["args"] if arg.startswith("--set=")}
    defined = {entry["name"] for entry in container["env"]}

    assert given <= parameters.keys()
    assert given >= {name for name, parameter in parameters.items() if not parameter.get("isOptional")}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) <= defined


def parse(words: list[str]) -> None:
    """As `slmops` would, without doing anything."""
    command: Any = typer.main.get_command(app)
    while commands := getattr(command, "commands", None):
        name, *words = words
        command = commands[name]
    command.make_context(command.name, list(words))


def test_publishing_is_out_of_reach_of_training(rendered: Rendered) -> None:
    """No account, role, secret or network path of `slmops` leads into `slmops-publish`."""
    resources = rendered("manifests/overlays/production")

    accounts = {pod.spec["serviceAccountName"] for pod in policies.pods(resources) if pod.namespace == "slmops-publish"}
    bound = {s["name"] for r in resources if r.kind == "RoleBinding" for s in r.content["subjects"]}
    holders = {pod.namespace for pod in policies.pods(resources) if "slmops-release-store" in json.dumps(pod.spec)}
    into = [r.name for r in resources if r.namespace == "slmops-publish" and r.content.get("spec", {}).get("ingress")]

    assert accounts == {"slmops-publish"}
    assert not accounts & bound
    assert holders == {"slmops-publish"}
    assert into == []


@pytest.mark.parametrize("overlay", ["staging", "production"])
def test_the_quota_lets_in_what_the_queue_admits(rendered: Rendered, overlay: str) -> None:
    resources = rendered(f"manifests/overlays/{overlay}")
    quota = next(r for r in resources if r.kind == "ResourceQuota" and r.namespace == "slmops").content["spec"]["hard"]
    queue = next(r for r in resources if r.kind == "ClusterQueue").content["spec"]["resourceGroups"][0]

    for name in queue["coveredResources"]:
        amounts = [r["nominalQuota"] for f in queue["flavors"] for r in f["resources"] if r["name"] == name]
        assert quantity(quota[f"requests.{name}"]) >= sum(map(quantity, amounts)), name


def quantity(text: str) -> int:
    """`128Gi` → bytes."""
    number, unit = re.fullmatch(r"(\d+)(Gi|Ti)?", text).groups()  # type: ignore[union-attr]
    return int(number) * {None: 1, "Gi": 1024**3, "Ti": 1024**4}[unit]


def assert_none(findings: Sequence[Finding]) -> None:
    assert not findings, "\n" + "\n".join(map(str, findings))
