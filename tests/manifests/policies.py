"""What every rendered object must keep to, one function per policy.

A policy takes all objects of one target and yields what is wrong. What the platform supplies, and each exception, is a
named entry here with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.manifests.rendering import Finding, Resource, walk

Policy = Callable[[Sequence[Resource]], Iterator[Finding]]

TRAINING = "slmops"
"""Where pods of cluster-wide templates run: the only namespace whose queue and quota has GPUs."""

SUPPLIED = {
    # By hand, or by External Secrets where an overlay includes it.
    ("Secret", "slmops", "slmops-object-store"),
    ("Secret", "slmops", "slmops-release-reader"),
    ("Secret", "slmops", "slmops-teacher-endpoint"),
    ("Secret", "slmops-publish", "slmops-release-store"),
    ("Secret", "slmops-edge", "slmops-release-reader"),
    ("Secret", "slmops-edge", "slmops-edge-api-key"),
}
"""(kind, namespace, name) of what pods refer to and the platform brings."""

NEEDS_TOKEN = {
    ("slmops", "slmops-steps"): "Argo's executor and KFP's launcher sit in each step's pod and call the API server",
}
"""Service accounts whose pods get a token for the API server, and why."""

NO_PORTS = {
    ("slmops", "allow-trainer-pods-among-each-other"): "collectives choose their ports",
}
"""Network policies that name no ports, and why."""

IMAGE_BY_DIGEST = re.compile(r"^[a-z0-9][a-z0-9._:/-]*@sha256:[0-9a-f]{64}$")
SECRET_NAME = re.compile(r"(SECRET|PASSWORD|TOKEN|ACCESS_KEY|API_KEY|CREDENTIAL)", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----|\bgh[pousr]_[A-Za-z0-9]{36}\b|\bhf_[A-Za-z]{34}\b"
)
RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
CLUSTER_WIDE = {
    "ClusterQueue",
    "ClusterRole",
    "ClusterRoleBinding",
    "ClusterTrainingRuntime",
    "LocalModelCache",
    "LocalModelNodeGroup",
    "Namespace",
    "ResourceFlavor",
    "WorkloadPriorityClass",
}


@dataclass(frozen=True)
class Pod:
    """A pod template, wherever in an object it is."""

    resource: Resource
    field: str
    spec: dict[str, Any]

    @property
    def namespace(self) -> str:
        return self.resource.namespace or TRAINING

    def containers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for group in ("initContainers", "containers", "ephemeralContainers"):
            for index, container in enumerate(self.spec.get(group, ())):
                yield f"{self.field}.{group}[{index}]", container

    def finding(self, field: str, message: str) -> Finding:
        return Finding(self.resource, f"{self.field}.{field}", message)


def pods(resources: Sequence[Resource]) -> Iterator[Pod]:
    """Every pod template of every kind, those inside custom resources too: what has containers with images."""
    for resource in resources:
        for field, value in resource.fields:
            containers = value.get("containers") if isinstance(value, dict) else None
            if isinstance(containers, list) and any(isinstance(c, dict) and "image" in c for c in containers):
                yield Pod(resource, field, value)


def pods_meet_pod_security_restricted(resources: Sequence[Resource]) -> Iterator[Finding]:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards, restricted."""
    for pod in pods(resources):
        for flag in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(flag):
                yield pod.finding(flag, "must not be set")
        for index, volume in enumerate(pod.spec.get("volumes", ())):
            for kind in sorted(volume.keys() - {"name"} - RESTRICTED_VOLUMES):
                yield pod.finding(f"volumes[{index}].{kind}", "restricted pods have no volumes of this kind")
        context = pod.spec.get("securityContext", {})
        for key in sorted(context.keys() & {"sysctls", "seLinuxOptions", "windowsOptions", "appArmorProfile"}):
            yield pod.finding(f"securityContext.{key}", "must be left to the cluster")
        yield from _user(pod.resource, f"{pod.field}.securityContext", context)
        for field, container in pod.containers():
            yield from _restricted_container(pod, field, container, context)


def _restricted_container(
    pod: Pod, field: str, container: dict[str, Any], pod_context: dict[str, Any]
) -> Iterator[Finding]:
    context = container.get("securityContext", {})
    where = f"{field}.securityContext"
    if context.get("runAsNonRoot", pod_context.get("runAsNonRoot")) is not True:
        yield Finding(pod.resource, f"{where}.runAsNonRoot", "must be true, here or for the pod")
    seccomp = context.get("seccompProfile", pod_context.get("seccompProfile", {})).get("type")
    if seccomp not in {"RuntimeDefault", "Localhost"}:
        yield Finding(pod.resource, f"{where}.seccompProfile.type", f"must be RuntimeDefault, got {seccomp}")
    if context.get("allowPrivilegeEscalation") is not False:
        yield Finding(pod.resource, f"{where}.allowPrivilegeEscalation", "must be false")
    if context.get("privileged"):
        yield Finding(pod.resource, f"{where}.privileged", "must not be set")
    capabilities = context.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", ()):
        yield Finding(pod.resource, f"{where}.capabilities.drop", "must have ALL")
    if added := set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
        yield Finding(pod.resource, f"{where}.capabilities.add", f"must not have {', '.join(sorted(added))}")
    if context.get("procMount", "Default") != "Default":
        yield Finding(pod.resource, f"{where}.procMount", "must be Default")
    for index, port in enumerate(container.get("ports", ())):
        if port.get("hostPort"):
            yield Finding(pod.resource, f"{field}.ports[{index}].hostPort", "must not be set")
    yield from _user(pod.resource, where, context)


def _user(resource: Resource, field: str, context: dict[str, Any]) -> Iterator[Finding]:
    if context.get("runAsUser") == 0:
        yield Finding(resource, f"{field}.runAsUser", "must not be root")


def steps_of_pipelines_are_limited_and_not_root(resources: Sequence[Resource]) -> Iterator[Finding]:
    """A step's pod is made by KFP at run time: what the pipeline can say of it, it says."""
    for resource in resources:
        if resource.kind != "PipelineVersion":
            continue
        spec = resource.content["spec"]
        platform = spec.get("platformSpec", {}).get("platforms", {}).get("kubernetes", {})
        settings = platform.get("deploymentSpec", {}).get("executors", {})
        for name, executor in spec["pipelineSpec"]["deploymentSpec"]["executors"].items():
            if "container" not in executor:
                continue
            where = f"spec.pipelineSpec.deploymentSpec.executors.{name}.container.resources"
            for key in ("resourceCpuRequest", "resourceCpuLimit", "resourceMemoryRequest", "resourceMemoryLimit"):
                if key not in executor["container"].get("resources", {}):
                    yield Finding(resource, f"{where}.{key}", "must be stated; see pipelines/placement.py")
            if settings.get(name, {}).get("securityContext", {}).get("runAsNonRoot") is not True:
                where = f"spec.platformSpec.platforms.kubernetes.deploymentSpec.executors.{name}.securityContext"
                yield Finding(resource, f"{where}.runAsNonRoot", "must be true; see pipelines/placement.py")


def root_file_systems_are_read_only(resources: Sequence[Resource]) -> Iterator[Finding]:
    for pod in pods(resources):
        for field, container in pod.containers():
            if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
                yield Finding(pod.resource, f"{field}.securityContext.readOnlyRootFilesystem", "must be true")


def images_are_named_by_digest(resources: Sequence[Resource]) -> Iterator[Finding]:
    """Also those that a pipeline's steps name, which no pod template shows."""
    for resource in resources:
        for field, value in resource.fields:
            if field.endswith(".image") and isinstance(value, str) and not IMAGE_BY_DIGEST.match(value):
                yield Finding(resource, field, f"must be name@sha256:<64 hex digits>, got {value}")


def containers_state_requests_and_limits(resources: Sequence[Resource]) -> Iterator[Finding]:
    for pod in pods(resources):
        for field, container in pod.containers():
            stated = container.get("resources", {})
            for kind in ("requests", "limits"):
                for name in ("cpu", "memory", "ephemeral-storage"):
                    if name not in stated.get(kind, {}):
                        yield Finding(pod.resource, f"{field}.resources.{kind}.{name}", "must be stated")


def secrets_are_named_never_given(resources: Sequence[Resource]) -> Iterator[Finding]:
    for resource in resources:
        if resource.kind == "Secret":
            yield Finding(resource, "kind", "no Secret may be in Git; name one and let the platform bring it")
        for field, value in resource.fields:
            if isinstance(value, str) and SECRET_VALUE.search(value):
                yield Finding(resource, field, "looks like a key; name a Secret instead")
            if (
                isinstance(value, dict)
                and SECRET_NAME.search(str(value.get("name", "")))
                and not str(value.get("value", "/")).startswith("/")  # the path of a file that holds it is no secret
            ):
                yield Finding(resource, f"{field}.value", f"{value['name']} must come from a Secret")


def roles_have_no_wildcards(resources: Sequence[Resource]) -> Iterator[Finding]:
    for resource in resources:
        if resource.kind in {"Role", "ClusterRole"}:
            for index, rule in enumerate(resource.content.get("rules") or ()):
                for key, values in rule.items():
                    if any("*" in str(value) for value in values):
                        yield Finding(resource, f"rules[{index}].{key}", f"must not have a wildcard, got {values}")
                if worst := {"escalate", "bind", "impersonate"} & set(rule.get("verbs", ())):
                    yield Finding(resource, f"rules[{index}].verbs", f"must not have {', '.join(sorted(worst))}")
                if "secrets" in rule.get("resources", ()) and not rule.get("resourceNames"):
                    yield Finding(resource, f"rules[{index}].resourceNames", "must say which secrets")


def bindings_give_no_cluster_wide_rights(resources: Sequence[Resource]) -> Iterator[Finding]:
    for resource in resources:
        if resource.kind == "ClusterRoleBinding":
            yield Finding(resource, "kind", "nothing of slmops has rights in the whole cluster; use a RoleBinding")
        elif resource.kind == "RoleBinding" and resource.content["roleRef"]["kind"] != "Role":
            got = resource.content["roleRef"]["name"]
            yield Finding(resource, "roleRef.name", f"must be a Role of the namespace, got ClusterRole {got}")
        if resource.kind == "RoleBinding":
            for index, subject in enumerate(resource.content.get("subjects", ())):
                if subject["kind"] != "ServiceAccount" or subject.get("namespace") != resource.namespace:
                    yield Finding(resource, f"subjects[{index}]", "must be a ServiceAccount of the same namespace")


def namespaces_enforce_restricted(resources: Sequence[Resource]) -> Iterator[Finding]:
    for resource in resources:
        if resource.kind == "Namespace":
            label = "pod-security.kubernetes.io/enforce"
            got = resource.content["metadata"].get("labels", {}).get(label)
            if got != "restricted":
                yield Finding(resource, f"metadata.labels[{label}]", f"must be restricted, got {got}")


def namespaces_deny_by_default(resources: Sequence[Resource]) -> Iterator[Finding]:
    """A policy that selects every pod and allows nothing."""
    denied = {
        resource.namespace
        for resource in resources
        if resource.kind == "NetworkPolicy"
        and resource.content["spec"]["podSelector"] == {}
        and set(resource.content["spec"].get("policyTypes", ())) == {"Ingress", "Egress"}
        and not resource.content["spec"].get("ingress")
        and not resource.content["spec"].get("egress")
    }
    for resource in resources:
        if resource.kind == "Namespace" and resource.name not in denied:
            yield Finding(resource, "metadata.name", "has no NetworkPolicy that denies all ingress and egress")


def allowed_flows_are_named_and_narrow(resources: Sequence[Resource]) -> Iterator[Finding]:
    for resource in resources:
        if resource.kind != "NetworkPolicy" or resource.name == "default-deny":
            continue
        if not resource.name.startswith("allow-"):
            yield Finding(resource, "metadata.name", "must say what it allows: allow-<flow>")
        spec = resource.content["spec"]
        for direction, peer in (("ingress", "from"), ("egress", "to")):
            for index, rule in enumerate(spec.get(direction) or ()):
                field = f"spec.{direction}[{index}]"
                if not rule.get(peer):
                    yield Finding(resource, f"{field}.{peer}", "must say with whom; without it everybody is meant")
                if not rule.get("ports") and (resource.namespace, resource.name) not in NO_PORTS:
                    yield Finding(resource, f"{field}.ports", "must say which; without it every port is meant")
                for at, entry in enumerate(rule.get(peer) or ()):
                    if entry.get("ipBlock", {}).get("cidr", "").endswith("/0") or entry.get("namespaceSelector") == {}:
                        yield Finding(resource, f"{field}.{peer}[{at}]", "must not be everybody")


def tokens_are_mounted_only_where_used(resources: Sequence[Resource]) -> Iterator[Finding]:
    for resource in resources:
        needed = (resource.namespace, resource.name) in NEEDS_TOKEN
        mounted = resource.content.get("automountServiceAccountToken") is not False
        if resource.kind == "ServiceAccount" and mounted and not needed:
            yield Finding(resource, "automountServiceAccountToken", "must be false")
    for pod in pods(resources):
        account = pod.namespace, pod.spec.get("serviceAccountName", "default")
        if account not in NEEDS_TOKEN and pod.spec.get("automountServiceAccountToken") is not False:
            yield pod.finding("automountServiceAccountToken", "must be false")


def servers_have_probes(resources: Sequence[Resource]) -> Iterator[Finding]:
    """A container that listens says when it is ready, and when it is beyond help."""
    for pod in pods(resources):
        for field, container in pod.containers():
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if container.get("ports") and probe not in container:
                    yield Finding(pod.resource, f"{field}.{probe}", "must be there: the container has ports")


def objects_are_in_namespaces_of_slmops(resources: Sequence[Resource]) -> Iterator[Finding]:
    for resource in resources:
        if resource.kind not in CLUSTER_WIDE and not resource.namespace:
            yield Finding(resource, "metadata.namespace", "must be stated; whoever applies it would choose another")


def references_lead_somewhere(resources: Sequence[Resource]) -> Iterator[Finding]:
    """Secrets, config maps, claims, service accounts, roles, queues: rendered here, or supplied by the platform."""
    known = {(r.kind, r.namespace, r.name) for r in resources} | SUPPLIED
    known |= {("Secret", r.namespace, r.name) for r in resources if r.kind == "ExternalSecret"}
    for resource, field, kind, namespace, name in _references(resources):
        if (kind, namespace, name) not in known:
            place = f" in namespace {namespace}" if namespace else ""
            yield Finding(resource, field, f"there is no {kind} {name}{place}; add it, or name it in SUPPLIED")


def _references(resources: Sequence[Resource]) -> Iterator[tuple[Resource, str, str, str | None, str]]:
    for pod in pods(resources):
        if account := pod.spec.get("serviceAccountName"):
            yield pod.resource, f"{pod.field}.serviceAccountName", "ServiceAccount", pod.namespace, account
        for field, value in walk(pod.spec, pod.field):
            key = field.rpartition(".")[2]
            if not isinstance(value, dict):
                continue
            if key in {"secretRef", "secretKeyRef"}:
                yield pod.resource, f"{field}.name", "Secret", pod.namespace, value["name"]
            elif key in {"configMapRef", "configMapKeyRef", "configMap"}:
                yield pod.resource, f"{field}.name", "ConfigMap", pod.namespace, value["name"]
            elif key == "secret":
                name = value.get("secretName") or value["name"]
                yield pod.resource, f"{field}.secretName", "Secret", pod.namespace, name
            elif key == "persistentVolumeClaim":
                yield pod.resource, f"{field}.claimName", "PersistentVolumeClaim", pod.namespace, value["claimName"]
    for resource in resources:
        content = resource.content
        if resource.kind == "PipelineVersion":
            yield from _references_of_steps(resource)
        elif resource.kind == "RoleBinding":
            yield resource, "roleRef.name", "Role", resource.namespace, content["roleRef"]["name"]
            for index, subject in enumerate(content.get("subjects", ())):
                yield resource, f"subjects[{index}]", subject["kind"], subject.get("namespace"), subject["name"]
        elif resource.kind == "LocalQueue":
            yield resource, "spec.clusterQueue", "ClusterQueue", None, content["spec"]["clusterQueue"]
        elif resource.kind == "ClusterQueue":
            for i, group in enumerate(content["spec"]["resourceGroups"]):
                for j, flavor in enumerate(group["flavors"]):
                    where = f"spec.resourceGroups[{i}].flavors[{j}].name"
                    yield resource, where, "ResourceFlavor", None, flavor["name"]
        elif resource.kind == "LocalModelCache":
            for index, group in enumerate(content["spec"]["nodeGroups"]):
                yield resource, f"spec.nodeGroups[{index}]", "LocalModelNodeGroup", None, group


def _references_of_steps(resource: Resource) -> Iterator[tuple[Resource, str, str, str | None, str]]:
    """What the pods of a pipeline's steps will refer to, as KFP's platform settings and parameters name it."""
    for field, value in resource.fields:
        if field.endswith(".store_secret.runtimeValue.constant"):
            yield resource, field, "Secret", resource.namespace, value
    for field, value in walk(resource.content["spec"].get("platformSpec", {}), "spec.platformSpec"):
        if isinstance(value, dict) and "secretName" in value:
            yield resource, f"{field}.secretName", "Secret", resource.namespace, value["secretName"]
        if isinstance(value, dict) and "pvcNameParameter" in value:
            yield resource, f"{field}.constant", "PersistentVolumeClaim", resource.namespace, value["constant"]


POLICIES: tuple[Policy, ...] = (
    allowed_flows_are_named_and_narrow,
    bindings_give_no_cluster_wide_rights,
    containers_state_requests_and_limits,
    images_are_named_by_digest,
    namespaces_deny_by_default,
    namespaces_enforce_restricted,
    objects_are_in_namespaces_of_slmops,
    pods_meet_pod_security_restricted,
    references_lead_somewhere,
    roles_have_no_wildcards,
    root_file_systems_are_read_only,
    secrets_are_named_never_given,
    servers_have_probes,
    steps_of_pipelines_are_limited_and_not_root,
    tokens_are_mounted_only_where_used,
)
