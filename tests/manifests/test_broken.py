"""Each overlay of `broken/` breaks one rule, and is caught for that alone: the message has target, object and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.manifests import policies, validation
from tests.manifests.conftest import Rendered
from tests.manifests.rendering import Finding, render

FOLDER = Path(__file__).with_name("broken")
EDGE_NAMESPACE = "manifests/clusters/production/edge"

DAEMON_SET = "DaemonSet/slmops-edge/edge-x86-cpu spec.template.spec"
PROMOTE = "CronJob/slmops-publish/promote spec.jobTemplate.spec.template.spec"
RUNTIME = "ClusterTrainingRuntime/slmops-torch spec.template.spec.replicatedJobs[0].template.spec.template.spec"
STEP = "PipelineVersion/slmops/one-step spec.pipelineSpec.deploymentSpec.executors.exec-gate.container"
STEPS = "Role/slmops/slmops-steps"

EXPECTED = {
    "account-that-does-not-exist": [
        f"{PROMOTE}.serviceAccountName: there is no ServiceAccount slmops-edge in namespace slmops-publish; add it, or "
        "name it in SUPPLIED"
    ],
    "any-secret": [f"{STEPS} rules[2].resourceNames: must say which secrets"],
    "cluster-admin": [
        "ClusterRoleBinding/slmops-steps kind: nothing of slmops has rights in the whole cluster; use a RoleBinding"
    ],
    "flow-to-everybody": [
        "NetworkPolicy/slmops-edge/allow-object-store spec.egress[0].to: must say with whom; without it everybody is "
        "meant"
    ],
    "flow-without-a-name": [
        "NetworkPolicy/slmops-edge/object-store metadata.name: must say what it allows: allow-<flow>"
    ],
    "host-path": [f"{DAEMON_SET}.volumes[3].hostPath: restricted pods have no volumes of this kind"],
    "kept-capabilities": [f"{PROMOTE}.containers[0].securityContext.capabilities.drop: must have ALL"],
    "missing-limit": [f"{DAEMON_SET}.containers[0].resources.limits.memory: must be stated"],
    "missing-limit-of-an-init-container": [f"{DAEMON_SET}.initContainers[0].resources.limits.cpu: must be stated"],
    "no-default-deny": ["Namespace/slmops-edge metadata.name: has no NetworkPolicy that denies all ingress and egress"],
    "object-without-a-namespace": [
        "LocalQueue/slmops-gpu metadata.namespace: must be stated; whoever applies it would choose another"
    ],
    "privilege-escalation": [f"{DAEMON_SET}.containers[0].securityContext.allowPrivilegeEscalation: must be false"],
    "root-user": [
        f"{DAEMON_SET}.{container}.securityContext.runAsNonRoot: must be true, here or for the pod"
        for container in ("initContainers[0]", "containers[0]")
    ],
    "secret-in-git": [
        "Secret/slmops-edge/slmops-edge-api-key kind: no Secret may be in Git; name one and let the platform bring it"
    ],
    "secret-in-the-environment": [
        f"{DAEMON_SET}.initContainers[0].env[3].value: AWS_SECRET_ACCESS_KEY must come from a Secret"
    ],
    "secret-of-a-pools-job-that-nobody-brings": [
        "PipelineVersion/slmops/one-step spec.pipelineSpec.root.dag.tasks.benchmark.inputs.parameters.store_secret."
        "runtimeValue.constant: there is no Secret slmops-edge-api-key in namespace slmops; add it, or name it in "
        "SUPPLIED"
    ],
    "secret-that-nobody-brings": [
        f"{DAEMON_SET}.initContainers[0].envFrom[0].secretRef.name: there is no Secret slmops-object-store in "
        "namespace slmops-edge; add it, or name it in SUPPLIED"
    ],
    "server-without-a-probe": [f"{DAEMON_SET}.containers[0].livenessProbe: must be there: the container has ports"],
    "step-by-tag": [
        f"{STEP}.image: must be name@sha256:<64 hex digits>, got registry.example:5000/team/slmops/base:0.1.0"
    ],
    "step-that-may-be-root": [
        "PipelineVersion/slmops/one-step spec.platformSpec.platforms.kubernetes.deploymentSpec.executors.exec-gate."
        "securityContext.runAsNonRoot: must be true; see pipelines/placement.py"
    ],
    "step-without-a-limit": [f"{STEP}.resources.resourceMemoryLimit: must be stated; see pipelines/placement.py"],
    "tag-in-a-custom-resource": [
        f"{RUNTIME}.containers[0].image: must be name@sha256:<64 hex digits>, got slmops/train:latest"
    ],
    "tag-instead-of-digest": [
        f"{DAEMON_SET}.containers[0].image: must be name@sha256:<64 hex digits>, got "
        "registry.example:5000/team/slmops/edge:0.1.0"
    ],
    "token-for-nothing": [f"{DAEMON_SET}.automountServiceAccountToken: must be false"],
    "unknown-field": [f"{DAEMON_SET}.containers[0].readinesProbe: unknown field"],
    "unknown-field-in-a-custom-resource": ["ClusterQueue/slmops-gpu spec.preemption.withinQueue: unknown field"],
    "unknown-field-in-a-template-of-a-custom-resource": [f"{RUNTIME}.containers[0].volumeMount: unknown field"],
    "unrestricted-namespace": [
        "Namespace/slmops-edge metadata.labels[pod-security.kubernetes.io/enforce]: must be restricted, got baseline"
    ],
    "version-that-a-kind-does-not-have": [
        "WorkloadPriorityClass/slmops-urgent kind: there is no schema of kueue.x-k8s.io/v1 WorkloadPriorityClass; "
        "correct it, or add one to tests/manifests/schemas"
    ],
    "wildcard-role": [f"{STEPS} rules[0].verbs: must not have a wildcard, got ['*']"],
    "writable-root-file-system": [f"{DAEMON_SET}.containers[0].securityContext.readOnlyRootFilesystem: must be true"],
    "wrong-type": ["DaemonSet/slmops-edge/edge-x86-cpu spec.minReadySeconds: '30' is not of type 'integer', 'null'"],
}
NEED_CRDS = {name for name in EXPECTED if "custom-resource" in name and "tag" not in name} | {
    "version-that-a-kind-does-not-have"
}


def test_every_broken_overlay_has_an_expectation() -> None:
    assert {path.name for path in FOLDER.iterdir()} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_broken_overlay_is_caught_for_its_reason_alone(pinned: Path, rendered: Rendered, name: str) -> None:
    if name in NEED_CRDS and not validation.CRDS.is_dir():
        pytest.skip(f"no custom resource definitions in {validation.CRDS}; set SLMOPS_CRDS")
    target = f"tests/manifests/broken/{name}"

    findings = find(pinned, rendered, target)

    assert [str(finding) for finding in findings] == [f"{target}: {expected}" for expected in EXPECTED[name]]


def find(pinned: Path, rendered: Rendered, target: str) -> list[Finding]:
    """All that schemas and policies find wrong with a target."""
    resources = render(pinned, target)
    with_crds = validation.CRDS.is_dir()
    findings = [
        finding
        for resource in resources
        if with_crds or validation.is_built_in(resource.content["apiVersion"])
        for finding in validation.check(resource)
    ]
    # A pool comes into a cluster that has the edge namespace.
    before = [] if any(r.kind == "Namespace" for r in resources) else rendered(EDGE_NAMESPACE)
    for policy in policies.POLICIES:
        findings += [finding for finding in policy([*resources, *before]) if finding.resource.target == target]
    return findings
