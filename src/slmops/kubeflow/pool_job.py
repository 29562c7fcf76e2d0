"""A plain Kubernetes Job that measures a variant on a node of an edge pool: the object, and how it is followed.

KFP's own pods run on one architecture only, so no step of a pipeline can be placed on the devices themselves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from slmops.config import explain
from slmops.device_classes import DeviceClass
from slmops.edge.measure import TASK
from slmops.errors import SlmopsError, TransientError, UserError
from slmops.kubeflow.follow_trainjob import EVICTIONS, KILLED, SLMOPS_EXIT
from slmops.kubeflow.manifests import placement
from slmops.kubeflow.trainjob import REQUEST_TIMEOUT_S, Api, Conflict, NotFound, condition, raw
from slmops.measuring import limits
from slmops.measuring.process import Outcome
from slmops.progress import log

CONTAINER = "measure"
POOL_LABEL = "slmops/pool"
JOB_LABEL = "batch.kubernetes.io/job-name"
USER = 10001
"""Of the edge image."""

REQUESTED_DISK = "64Mi"
"""As a pool's servers ask for; they keep releases on a claim, and the Job's pod has none."""
POLL_S = 2.0
KEPT_S = 3600
"""How long a Job that nobody follows any more stays after its end."""
LAST_LINES = 20
RESULT_LINES = 1000
"""A kubelet keeps long lines in pieces of 16 KiB, and counts the pieces."""
MAX_RESULT_BYTES = 4 * 1024 * 1024
CANNOT_START = {
    "CreateContainerConfigError", "CreateContainerError", "ErrImageNeverPull", "ImagePullBackOff", "InvalidImageName",
    "RunContainerError",
}  # fmt: skip
"""What a container waits for that time does not bring."""


@dataclass(frozen=True)
class PoolJob:
    """What to measure, and where."""

    name: str
    pool: str
    device_class: DeviceClass
    image: str
    store_uri: str
    store_secret: str
    manifest_digest: str
    task: str
    """As `slmops.edge.measure.pack_task` packs it."""
    pending_timeout_s: float
    timeout_s: int
    owner: dict[str, Any] | None = None
    """An owner reference: what takes the Job with it when it is deleted."""

    def manifest(self) -> dict[str, Any]:
        """The object to create."""
        labels = {"app.kubernetes.io/name": "slmops-measure", "app.kubernetes.io/part-of": "slmops"}
        # A sidecar of a service mesh would outlive the measurement, and take its part of the device.
        pod_labels = labels | {"sidecar.istio.io/inject": "false"}
        metadata: dict[str, Any] = {"name": self.name, "labels": labels}
        if self.owner:
            metadata["ownerReferences"] = [self.owner]
        spec = {
            "backoffLimit": 0,
            "activeDeadlineSeconds": int(self.pending_timeout_s) + self.timeout_s,
            "ttlSecondsAfterFinished": KEPT_S,
            "template": {"metadata": {"labels": pod_labels}, "spec": self._pod()},
        }
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}

    def _pod(self) -> dict[str, Any]:
        placed = _placed(self.device_class)
        container = {
            "name": CONTAINER,
            "image": self.image,
            "command": ["python3", "-m", "slmops.edge.measure"],
            "args": [f"--store={self.store_uri}", f"--manifest={self.manifest_digest}"],
            "env": [{"name": "HOME", "value": "/tmp"}, {"name": TASK, "value": self.task}],  # noqa: S108
            "envFrom": [{"secretRef": {"name": self.store_secret}}],
            "resources": self._resources(placed["containers"][0]["resources"]),
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
        }
        pod = {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "nodeSelector": placed["nodeSelector"] | {POOL_LABEL: self.pool},
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": f"{self.device_class.disk_mib}Mi"}}],
        }
        return pod | ({"tolerations": placed["tolerations"]} if "tolerations" in placed else {})

    def _resources(self, of_server: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
        """What a server of the pool gets, and room for the variant on the node's own disk."""
        return {
            "requests": {**of_server["requests"], "ephemeral-storage": REQUESTED_DISK},
            "limits": {**of_server["limits"], "ephemeral-storage": f"{self.device_class.disk_mib}Mi"},
        }


def _placed(device_class: DeviceClass) -> dict[str, Any]:
    """Node selector, tolerations and resources of the pods that serve a pool of this class."""
    patch = yaml.safe_load(placement(device_class)["patches"][0]["patch"])
    pod: dict[str, Any] = patch["spec"]["template"]["spec"]
    return pod


class Jobs(Api):
    """Jobs and their pods."""

    WHAT = "measuring on a pool"
    INSTEAD = "run the pipeline on a cluster, or leave pool empty"
    RIGHTS = "create, get and delete jobs, get and list pods, get pods/log and list events"
    LEFT_ALONE = f"a Job that runs goes on, and is removed {KEPT_S // 60} minutes after its end"
    WITHOUT_OWNER = "the Job gets no owner"

    def create(self, wanted: PoolJob) -> None:
        """Create the Job.

        Raises:
            UserError: creating is refused.
            TransientError: the API server does not answer.
        """
        with suppress(Conflict):  # nothing else has its name: it was created, and the first answer was lost
            self._ask(
                lambda: self._objects.create_namespaced_custom_object(
                    *self._jobs, wanted.manifest(), _request_timeout=REQUEST_TIMEOUT_S
                )
            )
        log.info("Job %s/%s created for pool %s", self.namespace, wanted.name, wanted.pool)

    def read(self, name: str) -> dict[str, Any] | None:
        """The Job; None if there is none."""
        try:
            found: dict[str, Any] = self._ask(
                lambda: self._objects.get_namespaced_custom_object(
                    *self._jobs, name, _request_timeout=REQUEST_TIMEOUT_S
                )
            )
        except NotFound:
            return None
        return found

    def delete(self, name: str) -> None:
        """Delete the Job with its pod; it may be gone already."""
        with suppress(NotFound):
            self._ask(
                lambda: self._objects.delete_namespaced_custom_object(
                    *self._jobs, name, propagation_policy="Background", _request_timeout=REQUEST_TIMEOUT_S
                )
            )

    def pod(self, name: str) -> dict[str, Any] | None:
        """The pod of a Job; None before it is made, or when it was deleted."""
        answer = self._get(
            lambda: self._core.list_namespaced_pod(self.namespace, label_selector=f"{JOB_LABEL}={name}", **raw())
        )
        pods: list[dict[str, Any]] = answer["items"]
        return pods[0] if pods else None

    def log_of(self, pod: str, lines: int) -> str:
        """The last lines of a pod's log; empty if the pod is gone."""
        try:
            answer = self._ask(
                lambda: self._core.read_namespaced_pod_log(
                    pod, self.namespace, container=CONTAINER, tail_lines=lines, **raw()
                )
            )
        except NotFound:
            return ""
        return str(answer.data.decode(errors="replace"))

    @property
    def _jobs(self) -> tuple[str, str, str, str]:
        return "batch", "v1", self.namespace, "jobs"


class _Result(BaseModel):
    """What the pod prints last."""

    model_config = ConfigDict(extra="forbid", strict=True)

    facts: dict[str, Any]
    requests: list[dict[str, float]]


def measure(jobs: Jobs, wanted: PoolJob) -> Outcome:
    """Create the Job, wait for its end, take over what it measured, and delete it, however it ended.

    A pod that was ended because it needs more memory than the class has is a result: `failed`.

    Raises:
        UserError: no node fits, the image cannot be pulled, or the measurement itself says so.
        TransientError: a node took too long or was lost, or somebody deleted the Job.
    """
    try:
        jobs.create(wanted)
        return _follow(jobs, wanted)
    finally:
        try:
            jobs.delete(wanted.name)
        except SlmopsError as error:  # what came before counts more, and the Job goes by itself
            log.warning("Job %s/%s is not deleted: %s", jobs.namespace, wanted.name, error)


def _follow(jobs: Jobs, wanted: PoolJob) -> Outcome:
    start_before, state = time.monotonic() + wanted.pending_timeout_s, ""
    while True:
        job, pod = jobs.read(wanted.name), jobs.pod(wanted.name)
        if job is None:
            raise TransientError(f"Job {jobs.namespace}/{wanted.name} was deleted by somebody else")
        phase = pod["status"].get("phase") if pod else None
        if pod and phase == "Succeeded":
            return _read_result(jobs, wanted, pod)
        if pod and phase == "Failed":
            return _explain(jobs, wanted, pod)
        if failed := condition(job, "Failed"):
            raise TransientError(
                f"Job {jobs.namespace}/{wanted.name} failed ({failed['reason']}: {failed.get('message', '')}); if the "
                "device is slow, lower num_requests or raise pool_timeout_s"
            )
        waits = "" if phase == "Running" else _waits_for(pod) or _problems(jobs, wanted)
        found = f"runs on {pod['spec'].get('nodeName')}" if pod and phase == "Running" else f"waits: {waits}"
        if found != state:
            log.info("Job %s %s", wanted.name, state := found)
        reason = waits.partition(":")[0]
        if reason in CANNOT_START:
            raise UserError(f"the pod of Job {jobs.namespace}/{wanted.name} cannot start: {waits}")
        if waits and time.monotonic() > start_before:
            raise UserError(
                f"no node of pool {wanted.pool} has taken the pod of Job {jobs.namespace}/{wanted.name} within "
                f"{wanted.pending_timeout_s:.0f} s: {waits}; it wants {_selector(wanted)}"
            )
        time.sleep(POLL_S)


def _waits_for(pod: Mapping[str, Any] | None) -> str:
    """What holds up a pod that does not run yet, in the words of kubelet or scheduler."""
    if pod is None:
        return ""
    status = pod["status"]
    for container in status.get("containerStatuses") or []:
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason"):
            return f"{waiting['reason']}: {waiting.get('message') or ''}".rstrip(": ")
    for found in status.get("conditions") or []:
        if found["type"] == "PodScheduled" and found["status"] == "False":
            return f"{found.get('reason') or 'Unschedulable'}: {found.get('message') or ''}".rstrip(": ")
    return str(status.get("phase") or "Pending")


def _problems(jobs: Jobs, wanted: PoolJob) -> str:
    """Why a Job has no pod yet: a quota or a policy of the namespace shows in its events only."""
    events = jobs.warnings(wanted.name)
    return f"{events[-1].get('reason')}: {events[-1].get('message')}" if events else "no pod yet"


def _selector(wanted: PoolJob) -> str:
    return ", ".join(
        f"{key}={value}" for key, value in sorted(wanted.manifest()["spec"]["template"]["spec"]["nodeSelector"].items())
    )


def _explain(jobs: Jobs, wanted: PoolJob, pod: Mapping[str, Any]) -> Outcome:
    """The result that a failed pod is, where it is one.

    Raises:
        SlmopsError: it is none; of the class that the pod's own error had, where that is known.
    """
    status, name = pod["status"], pod["metadata"]["name"]
    states = [c.get("state", {}) for c in status.get("containerStatuses") or [] if c["name"] == CONTAINER]
    ended: dict[str, Any] = (states[0].get("terminated") if states else None) or {}
    code, reason = ended.get("exitCode"), ended.get("reason") or status.get("reason") or "Error"
    if reason == "OOMKilled":
        ram_bytes = wanted.device_class.ram_mib * limits.MIB
        return Outcome(
            {"status": "failed", "reason": limits.killed(ram_bytes), "limits": "cgroup"} | _where(wanted, pod)
        )
    said = SLMOPS_EXIT.match(ended.get("message") or "")
    why = f"pod {name} ended with exit code {code} ({reason})" if ended else f"pod {name} failed ({reason})"
    if said:
        error = {2: UserError, 75: TransientError, 143: TransientError}.get(int(said["code"]), SlmopsError)
        raise error(f"{why}: {said['message']}")
    lines = jobs.log_of(name, LAST_LINES).rstrip()
    why = f"{why}: {status.get('message') or 'it left no message'}; its last lines:\n{lines}"
    lost = status.get("reason") in EVICTIONS or code in KILLED or not ended
    raise (TransientError if lost else SlmopsError)(why)


def _read_result(jobs: Jobs, wanted: PoolJob, pod: Mapping[str, Any]) -> Outcome:
    """What the pod has printed last.

    Raises:
        SlmopsError: it is no result.
    """
    name = pod["metadata"]["name"]
    text = jobs.log_of(name, RESULT_LINES).rstrip()
    line = text.rpartition("\n")[2]
    if len(line) > MAX_RESULT_BYTES:
        raise SlmopsError(f"the last line of pod {name} has {len(line):,} characters, which no result has")
    try:
        result = _Result.model_validate_json(line)
    except ValidationError as error:
        raise SlmopsError(
            f"the last line of pod {name} is no result ({explain(error, 'Result')}); is {wanted.image} the edge image "
            f"of this version? It is: {line[:200]!r}"
        ) from None
    if result.facts.get("status") not in {"measured", "failed", "not_run"}:
        raise SlmopsError(f"pod {name} reports the status {result.facts.get('status')!r:.80}, which no result has")
    return Outcome(result.facts | _where(wanted, pod), result.requests)


def _where(wanted: PoolJob, pod: Mapping[str, Any]) -> dict[str, Any]:
    return {"pool": wanted.pool, "node": pod["spec"].get("nodeName", "")}
