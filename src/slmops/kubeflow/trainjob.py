"""A Kubeflow Trainer `TrainJob`: the object, and a client that creates, follows, explains and deletes it.

API `trainer.kubeflow.org/v1alpha1`. The runtime that it refers to makes a JobSet of one pod per node, and its torch
policy gives torchrun in each pod PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from slmops.errors import ConfigError, SlmopsError, TransientError, UserError
from slmops.progress import log

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE = "node"
"""Name that the runtime gives the replicated job of the training's pods, and their container."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
POD_LABEL = "jobset.sigs.k8s.io/jobset-name"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
DIGEST = "slmops.kubeflow.org/spec-digest"
"""Annotation: tells whether a TrainJob that exists already is the wanted one."""
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

ROUND_S = 10
"""Pods, events and log lines are looked at this often; the end of the TrainJob shows at once."""
SILENCE_S = 300.0
"""How long an API server may give no useful answer before the step gives up; the TrainJob goes on."""
DELETE_S = 120.0
"""How long a deleted TrainJob and its pods may take to go."""
REQUEST_TIMEOUT_S = (10, 60)
"""Connecting, and between two reads."""
LAST_LINES = 20

EVICTIONS = {"Evicted", "NodeLost", "Preempting", "Shutdown", "Terminated", "NodeShutdown", "UnexpectedAdmissionError"}
KILLED = {137, 143}
"""Exit codes of a container that the kubelet or the node ended."""
TORCHRUN_TERMINATED = "got signal: 15"
"""In torchrun's last lines: it was told to end, and ends with exit code 1."""
SLMOPS_EXIT = re.compile(r"^(?P<message>.*)\nexit code (?P<code>\d+)\s*$", re.DOTALL)
"""What `slmops.step` leaves as a container's termination message."""

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """What a TrainJob is to run, and where."""

    name: str
    args: list[str]
    """Arguments of torchrun."""
    num_nodes: int
    runtime: str
    queue_name: str
    image: str | None = None
    """None leaves the runtime's own."""
    owner: dict[str, Any] | None = None
    """An owner reference: what takes the TrainJob with it when it is deleted."""
    resources: dict[str, Any] = field(default_factory=dict)
    env: list[dict[str, Any]] = field(default_factory=list)
    volumes: list[dict[str, Any]] = field(default_factory=list)
    volume_mounts: list[dict[str, Any]] = field(default_factory=list)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    node_selector: dict[str, str] = field(default_factory=dict)
    affinity: dict[str, Any] = field(default_factory=dict)

    def manifest(self) -> dict[str, Any]:
        """The object to create."""
        spec = self._spec()
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        metadata = {
            "name": self.name,
            "labels": {QUEUE_LABEL: self.queue_name, "app.kubernetes.io/part-of": "slmops"},
            "annotations": {DIGEST: digest},
            "ownerReferences": [self.owner] if self.owner else None,
        }
        return {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "TrainJob",
            "metadata": _without_empty(metadata),
            "spec": spec,
        }

    def _spec(self) -> dict[str, Any]:
        trainer = {
            "image": self.image,
            "command": ["torchrun"],
            "args": self.args,
            "numNodes": self.num_nodes,
            "numProcPerNode": _num_gpus(self.resources) or 1,
            "resourcesPerNode": _without_empty(self.resources),
            "env": self.env,
        }
        container = {"name": NODE, "volumeMounts": self.volume_mounts}
        pod = {
            "containers": [_without_empty(container)],
            "volumes": self.volumes,
            "tolerations": self.tolerations,
            "nodeSelector": self.node_selector,
            "affinity": self.affinity,
        }
        job = {"name": NODE, "template": {"spec": {"template": {"spec": _without_empty(pod)}}}}
        patch = {"template": {"spec": {"replicatedJobs": [job]}}}
        return {
            "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": self.runtime},
            "trainer": _without_empty(trainer),
            "runtimePatches": [{"manager": "slmops.kubeflow.org/step", "trainingRuntimeSpec": patch}],
        }


def _num_gpus(resources: Mapping[str, Any]) -> int:
    """One process for each GPU of a node; GPUs are counted by the names that device plugins give them."""
    limits = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    return sum(int(count) for name, count in limits.items() if name.endswith("/gpu") or "/mig-" in name)


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, [], {}, "")}


@dataclass(frozen=True)
class Failure:
    """Why a pod of the training ended."""

    pod: str
    why: str
    """Exit code and reason, and the error that the training itself gave, if it came to that."""
    error: type[SlmopsError]
    last_lines: str
    order: int
    """Which failure of several is the cause: the lowest. Those of a lost node end the other nodes' pods in turn."""

    def __str__(self) -> str:
        lines = f"; its last lines:\n{self.last_lines}" if self.last_lines else ""
        return f"pod {self.pod} {self.why}{lines}"


class Cluster:
    """The API server, as far as TrainJobs and their pods go."""

    def __init__(self) -> None:
        """Connect with the pod's service account, else with the kubeconfig of this user.

        Raises:
            ConfigError: there is neither.
        """
        from kubernetes import client, config

        configuration = client.Configuration()
        try:
            if NAMESPACE_FILE.exists():
                config.load_incluster_config(client_configuration=configuration)
                self.namespace = NAMESPACE_FILE.read_text().strip()
            else:
                config.load_kube_config(client_configuration=configuration)
                context = config.list_kube_config_contexts()[1]["context"]
                self.namespace = context.get("namespace") or "default"
        except config.ConfigException as error:
            raise ConfigError(
                f"training on several nodes needs a Kubernetes cluster, and this process knows none ({error}); run the "
                "pipeline on a cluster, or set num_nodes=1"
            ) from error
        configuration.retries = False  # `_ask` tries again, and knows for how long
        api = client.ApiClient(configuration)
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    def own_pod(self, name: str) -> dict[str, Any]:
        """The pod called `name`, as the API has it; empty if it may not be read."""
        try:
            return self._get(lambda: self._core.read_namespaced_pod(name, self.namespace, **_raw()))
        except (Refused, _NotFound) as error:
            log.warning("%s; the TrainJob gets no owner, and the image of its runtime", error)
            return {}

    def create(self, wanted: Wanted) -> None:
        """Create the TrainJob, or find it again: one that an earlier try of this step made goes on.

        One that has failed, or is being deleted, is replaced.

        Raises:
            UserError: another TrainJob of this name runs, or creating is refused.
            TransientError: the API server does not answer, or an old TrainJob does not go.
        """
        body = wanted.manifest()
        deadline = time.monotonic() + DELETE_S
        while time.monotonic() < deadline:
            if self._try_to_create(body):
                log.info("TrainJob %s/%s created: %d nodes", self.namespace, wanted.name, wanted.num_nodes)
                return
            found = self.read(wanted.name)
            if found is None:
                continue
            ours = found["metadata"].get("annotations", {}).get(DIGEST) == body["metadata"]["annotations"][DIGEST]
            ended = _condition(found, "Failed") or (_condition(found, "Complete") and not ours)
            if found["metadata"].get("deletionTimestamp") or ended:
                self.delete(wanted.name)
            elif ours:
                log.info("TrainJob %s/%s is there already: following it", self.namespace, wanted.name)
                return
            else:
                raise UserError(
                    f"TrainJob {self.namespace}/{wanted.name} is training from the same data with other settings "
                    f"of its pods; wait for it, or remove it: kubectl -n {self.namespace} delete trainjob {wanted.name}"
                )
        raise TransientError(f"an old TrainJob {self.namespace}/{wanted.name} does not go away; try again later")

    def read(self, name: str) -> dict[str, Any] | None:
        """The TrainJob; None if there is none."""
        try:
            found: dict[str, Any] = self._ask(
                lambda: self._objects.get_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, PLURAL, name, _request_timeout=REQUEST_TIMEOUT_S
                )
            )
        except _NotFound:
            return None
        return found

    def delete(self, name: str) -> None:
        """Delete the TrainJob with its pods, and wait until it is gone; it may be gone already.

        Raises:
            TransientError: it does not go.
        """
        deadline = time.monotonic() + DELETE_S
        try:
            self._ask(
                lambda: self._objects.delete_namespaced_custom_object(
                    GROUP,
                    VERSION,
                    self.namespace,
                    PLURAL,
                    name,
                    propagation_policy="Foreground",
                    _request_timeout=REQUEST_TIMEOUT_S,
                )
            )
        except _NotFound:
            return
        while self.read(name) is not None:
            if time.monotonic() > deadline:
                raise TransientError(f"TrainJob {self.namespace}/{name} does not go away; look at its pods")
            time.sleep(1)

    def follow(self, wanted: Wanted, pending_timeout_s: float) -> None:
        """Wait for the end of the TrainJob, and show states, warnings and the log of its first process meanwhile.

        Raises:
            SlmopsError: it failed; of the class that the training's own error had, where that is known.
            TransientError: it was deleted by somebody else, did not start in time, or the API server fell silent.
        """
        view = _View(self, wanted, time.monotonic() + pending_timeout_s)
        while True:
            found = self.read(wanted.name)
            if found is None:
                raise TransientError(
                    f"TrainJob {self.namespace}/{wanted.name} was deleted by somebody else; its checkpoint is kept"
                )
            view.look_around()
            if view.ended(found):
                return
            for changed in self._changes(wanted.name, found["metadata"]["resourceVersion"]):
                if view.ended(changed):
                    return

    def pods(self, name: str) -> list[dict[str, Any]]:
        """The pods of a TrainJob."""
        answer = self._get(
            lambda: self._core.list_namespaced_pod(self.namespace, label_selector=f"{POD_LABEL}={name}", **_raw())
        )
        pods: list[dict[str, Any]] = answer["items"]
        return pods

    def warnings(self, name: str) -> list[dict[str, Any]]:
        """The Warning events of a TrainJob, its JobSet, jobs and pods, whose names all begin with its own."""
        answer = self._get(
            lambda: self._core.list_namespaced_event(self.namespace, field_selector="type=Warning", **_raw())
        )
        return [event for event in answer["items"] if str(event["involvedObject"].get("name", "")).startswith(name)]

    def log_lines(self, pod: str, **options: Any) -> list[str]:
        """Lines of a pod's log; none if the pod is gone or has not started."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = self._core.read_namespaced_pod_log(pod, self.namespace, container=NODE, **_raw(), **options)
            return str(answer.data.decode(errors="replace")).splitlines()
        except (ApiException, HTTPError):
            return []

    def _try_to_create(self, body: dict[str, Any]) -> bool:
        try:
            self._ask(
                lambda: self._objects.create_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, PLURAL, body, _request_timeout=REQUEST_TIMEOUT_S
                )
            )
        except _Conflict:
            return False
        except _NotFound:
            raise UserError(
                f"the cluster does not know {PLURAL}.{GROUP}/{VERSION}; install Kubeflow Trainer, or set num_nodes=1"
            ) from None
        return True

    def _changes(self, name: str, resource_version: str) -> Iterator[dict[str, Any]]:
        """New states of the TrainJob for `ROUND_S`; ends early when the watch breaks or its version is too old.

        Either way the next `read` finds out what is, so nothing is lost.
        """
        from kubernetes import watch
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        started = time.monotonic()
        try:
            for event in watch.Watch().stream(
                self._objects.list_namespaced_custom_object,
                GROUP,
                VERSION,
                self.namespace,
                PLURAL,
                field_selector=f"metadata.name={name}",
                resource_version=resource_version,
                timeout_seconds=ROUND_S,
                _request_timeout=REQUEST_TIMEOUT_S,
            ):
                if event["type"] == "DELETED":
                    return
                if event["type"] in {"ADDED", "MODIFIED"}:
                    yield event["object"]
        except (ApiException, HTTPError, ValueError):
            # A server that breaks every watch at once is asked no more often than one that does not.
            time.sleep(max(0.0, min(1.0, ROUND_S - (time.monotonic() - started))))

    def _get(self, request: Callable[[], Any]) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._ask(request).data)
        return answer

    def _ask(self, request: Callable[[], T]) -> T:
        """The answer to a request, asked again while the server is out of order.

        Raises:
            _NotFound, _Conflict: it said so.
            Refused: it did.
            TransientError: no useful answer for `SILENCE_S`.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        deadline, pause_s = time.monotonic() + SILENCE_S, 0.5
        while True:
            try:
                return request()
            except ApiException as error:
                self._check_status(error)
                problem = f"answers {error.status} {error.reason}"
            except HTTPError as error:
                problem = f"does not answer ({type(error).__name__})"
            if time.monotonic() + pause_s > deadline:
                raise TransientError(
                    f"the Kubernetes API server {problem}, for {SILENCE_S:.0f} s now; a TrainJob that runs goes on, "
                    "and the same step finds it again"
                )
            time.sleep(pause_s)
            pause_s = min(30.0, pause_s * 2)

    def _check_status(self, error: Any) -> None:
        """Raise what a refusal means; return if asking again may help."""
        match error.status:
            case 404:
                raise _NotFound(_message(error))
            case 409:
                raise _Conflict
            case 401 | 403:
                raise Refused(
                    f"the Kubernetes API server refuses ({error.status}): {_message(error)}; a step that trains on "
                    "several nodes needs a service account that may create, get, list, watch and delete trainjobs, get "
                    "and list pods, get pods/log and list events"
                )
            case int(status) if 400 <= status < 500 and status not in {408, 410, 429}:
                raise Refused(f"the Kubernetes API server refuses ({status}): {_message(error)}")


class _View:
    """What has been shown of a TrainJob, so that only news is."""

    def __init__(self, cluster: Cluster, wanted: Wanted, start_before: float) -> None:
        self.cluster, self.wanted, self._start_before = cluster, wanted, start_before
        self._started = False
        self._state = ""
        self._pods: dict[str, str] = {}
        self._warned: set[tuple[str, ...]] = set()
        self._failures: dict[str, Failure] = {}
        self._logged_until = ""

    def ended(self, job: Mapping[str, Any]) -> bool:
        """Show the TrainJob's state if it is new; whether it is complete.

        Raises:
            SlmopsError: it failed.
            TransientError: it did not start in time.
        """
        if _condition(job, "Complete"):
            self.look_around()
            return True
        if failed := _condition(job, "Failed"):
            self.look_around()
            raise self._explain(failed)
        suspended = _condition(job, "Suspended")
        state = "running" if self._started else "starting its pods"
        if suspended:
            state = f"waiting in queue {self.wanted.queue_name} ({suspended.get('message') or suspended['reason']})"
        if state != self._state:
            log.info("TrainJob %s: %s", self.wanted.name, state)
            self._state = state
        if not self._started and time.monotonic() > self._start_before:
            raise NotStarted(f"TrainJob {self.wanted.name} did not start in time: it was {state}; try again later")
        return False

    def look_around(self) -> None:
        """Show what is new of pods, warnings and the first process's log."""
        pods = sorted(self.cluster.pods(self.wanted.name), key=lambda pod: str(pod["metadata"]["name"]))
        for pod in pods:
            name, state = pod["metadata"]["name"], _pod_state(pod)
            if self._pods.get(name) != state:
                log.info("pod %s: %s", name, state)
                self._pods[name] = state
            if name not in self._failures and (failure := self._failure(pod)):
                self._failures[name] = failure
                log.warning("%s", failure)
        self._started = self._started or (
            sum(pod["status"].get("phase") in {"Running", "Succeeded"} for pod in pods) >= self.wanted.num_nodes
        )
        for event in self.cluster.warnings(self.wanted.name):
            about = event["involvedObject"]
            news = (about["kind"], about["name"], event.get("reason") or "", event.get("message") or "")
            if news not in self._warned:
                self._warned.add(news)
                log.warning("%s %s: %s: %s", *news)
        for pod in pods:
            if pod["metadata"].get("labels", {}).get(INDEX_LABEL) == "0":
                self._show_log(pod["metadata"]["name"])

    def _show_log(self, pod: str) -> None:
        for line in self.cluster.log_lines(pod, timestamps=True, since_seconds=ROUND_S * 3):
            stamp, _, text = line.partition(" ")
            stamp = _sortable(stamp)
            if stamp > self._logged_until:
                self._logged_until = stamp
                log.info("node 0: %s", text)

    def _failure(self, pod: Mapping[str, Any]) -> Failure | None:
        """Why a pod failed; None if it did not."""
        status, name = pod["status"], pod["metadata"]["name"]
        ended = _terminated(status)
        evicted = status.get("reason") in EVICTIONS
        if status.get("phase") != "Failed" and not (ended and ended.get("exitCode")):
            return None
        code, reason = ended.get("exitCode"), ended.get("reason") or status.get("reason") or "Error"
        said = SLMOPS_EXIT.match(ended.get("message") or "")
        why = f"ended with exit code {code} ({reason})" if ended else f"failed ({reason}: {status.get('message', '')})"
        lines = "\n".join(f"  {line}" for line in self.cluster.log_lines(name, tail_lines=LAST_LINES))
        if reason == "OOMKilled":
            why += ": it needs more memory; lower micro_batch_size or max_length, or ask for more"
            return Failure(name, why, UserError, lines, order=0)
        if said:
            error = {2: UserError, 75: TransientError}.get(int(said["code"]), SlmopsError)
            order = 3 if error is TransientError else 0  # it may only have missed a pod that ended before
            return Failure(name, f"{why}: {said['message']}", error, lines, order)
        if evicted or code in KILLED or not ended:
            return Failure(name, why, TransientError, lines, order=1)
        if TORCHRUN_TERMINATED in lines:
            return Failure(name, why, TransientError, lines, order=4)
        return Failure(name, why, SlmopsError, lines, order=2)

    def _explain(self, failed: Mapping[str, Any]) -> SlmopsError:
        """The error of a failed TrainJob: of the pod that is the cause; others ended because it was gone."""
        summary = f"TrainJob {self.wanted.name} failed ({failed['reason']}: {failed.get('message', '')})"
        if not self._failures:
            return SlmopsError(
                f"{summary}, and none of its pods is left to tell why; look at its events: kubectl -n "
                f"{self.cluster.namespace} describe trainjob {self.wanted.name}"
            )
        cause = min(self._failures.values(), key=lambda failure: failure.order)
        return cause.error(f"{summary}: {cause}")


class NotStarted(TransientError):
    """A TrainJob that found no place in time."""


class Refused(UserError):
    """The API server does not allow what this step needs, or does not accept the object."""


class _NotFound(Exception):
    """There is no such object, or no such kind of object."""


class _Conflict(Exception):
    """There is an object of that name already."""


def _raw() -> dict[str, Any]:
    """Options of a request whose answer is taken as the JSON that it is."""
    return {"_preload_content": False, "_request_timeout": REQUEST_TIMEOUT_S}


def _condition(job: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """A condition of a TrainJob that is true."""
    conditions: list[dict[str, Any]] = job.get("status", {}).get("conditions") or []
    return next((each for each in conditions if each["type"] == kind and each["status"] == "True"), None)


def _pod_state(pod: Mapping[str, Any]) -> str:
    """One word for where a pod is, and what holds it up."""
    status = pod["status"]
    for container in status.get("containerStatuses") or []:
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason"):
            return f"{waiting['reason']} {waiting.get('message') or ''}".strip()
    return str(status.get("phase", "Unknown")).lower()


def _terminated(status: Mapping[str, Any]) -> dict[str, Any]:
    """How a pod's training container ended, now or before its last restart; empty if it did not."""
    for container in status.get("containerStatuses") or []:
        if container["name"] == NODE:
            ended: dict[str, Any] | None = container.get("state", {}).get("terminated")
            before: dict[str, Any] | None = container.get("lastState", {}).get("terminated")
            return ended or before or {}
    return {}


def _sortable(stamp: str) -> str:
    """An RFC 3339 time whose fraction has nine digits, so that text order is time order."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return f"{whole}.{fraction:0<9}" if whole else ""


def _message(error: Any) -> str:
    """What the API server says about a refusal."""
    try:
        return str(json.loads(error.body)["message"])[:1000]
    except (TypeError, ValueError, KeyError):
        return str(error.body or error.reason)[:1000]
