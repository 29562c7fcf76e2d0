"""A Kubeflow Trainer `TrainJob`: the object, and a client that creates, reads and deletes it.

API `trainer.kubeflow.org/v1alpha1`. The runtime that it refers to makes a JobSet of one pod per node, and its torch
policy gives torchrun in each pod PET_NNODES, PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from slmops.errors import ConfigError, TransientError, UserError
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


class Api:
    """The API server of the cluster that a step is in, asked again while it is out of order."""

    WHAT: ClassVar[str]
    """What needs a cluster. This and the next are parts of sentences in errors."""
    INSTEAD: ClassVar[str]
    """What to do without one."""
    RIGHTS: ClassVar[str]
    """What the service account must be allowed to do."""
    LEFT_ALONE: ClassVar[str]
    """What becomes of that which runs while the API server is silent."""
    WITHOUT_OWNER: ClassVar[str]
    """What follows if the step may not read its own pod."""

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
                f"{self.WHAT} needs a Kubernetes cluster, and this process knows none ({error}); {self.INSTEAD}"
            ) from error
        configuration.retries = False  # `_ask` tries again, and knows for how long
        api = client.ApiClient(configuration)
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    def own_pod(self, name: str) -> dict[str, Any]:
        """The pod called `name`, as the API has it; empty if it may not be read."""
        try:
            return self._get(lambda: self._core.read_namespaced_pod(name, self.namespace, **raw()))
        except (Refused, NotFound) as error:
            log.warning("%s; %s", error, self.WITHOUT_OWNER)
            return {}

    def warnings(self, name: str) -> list[dict[str, Any]]:
        """The Warning events of an object and of what was made for it: their names all begin with its own."""
        answer = self._get(
            lambda: self._core.list_namespaced_event(self.namespace, field_selector="type=Warning", **raw())
        )
        return [event for event in answer["items"] if str(event["involvedObject"].get("name", "")).startswith(name)]

    def _get(self, request: Callable[[], Any]) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._ask(request).data)
        return answer

    def _ask(self, request: Callable[[], T]) -> T:
        """The answer to a request, asked again while the server is out of order.

        Raises:
            NotFound, Conflict: it said so.
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
                    f"the Kubernetes API server {problem}, for {SILENCE_S:.0f} s now; {self.LEFT_ALONE}"
                )
            time.sleep(pause_s)
            pause_s = min(30.0, pause_s * 2)

    def _check_status(self, error: Any) -> None:
        """Raise what a refusal means; return if asking again may help."""
        match error.status:
            case 404:
                raise NotFound(_message(error))
            case 409:
                raise Conflict
            case 401 | 403:
                raise Refused(
                    f"the Kubernetes API server refuses ({error.status}): {_message(error)}; {self.WHAT} needs a "
                    f"service account that may {self.RIGHTS}"
                )
            case int(status) if 400 <= status < 500 and status not in {408, 410, 429}:
                raise Refused(f"the Kubernetes API server refuses ({status}): {_message(error)}")


class Cluster(Api):
    """TrainJobs and their pods."""

    WHAT: ClassVar[str] = "training on several nodes"
    INSTEAD: ClassVar[str] = "run the pipeline on a cluster, or set num_nodes=1"
    RIGHTS: ClassVar[str] = (
        "create, get, list, watch and delete trainjobs, get and list pods, get pods/log and list events"
    )
    LEFT_ALONE: ClassVar[str] = "a TrainJob that runs goes on, and the same step finds it again"
    WITHOUT_OWNER: ClassVar[str] = "the TrainJob gets no owner, and the image of its runtime"

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
            ended = condition(found, "Failed") or (condition(found, "Complete") and not ours)
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
        except NotFound:
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
        except NotFound:
            return
        while self.read(name) is not None:
            if time.monotonic() > deadline:
                raise TransientError(f"TrainJob {self.namespace}/{name} does not go away; look at its pods")
            time.sleep(1)

    def pods(self, name: str) -> list[dict[str, Any]]:
        """The pods of a TrainJob."""
        answer = self._get(
            lambda: self._core.list_namespaced_pod(self.namespace, label_selector=f"{POD_LABEL}={name}", **raw())
        )
        pods: list[dict[str, Any]] = answer["items"]
        return pods

    def log_lines(self, pod: str, **options: Any) -> list[str]:
        """Lines of a pod's log; none if the pod is gone or has not started."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = self._core.read_namespaced_pod_log(pod, self.namespace, container=NODE, **raw(), **options)
            return str(answer.data.decode(errors="replace")).splitlines()
        except (ApiException, HTTPError):
            return []

    def changes(self, name: str, resource_version: str) -> Iterator[dict[str, Any]]:
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

    def _try_to_create(self, body: dict[str, Any]) -> bool:
        try:
            self._ask(
                lambda: self._objects.create_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, PLURAL, body, _request_timeout=REQUEST_TIMEOUT_S
                )
            )
        except Conflict:
            return False
        except NotFound:
            raise UserError(
                f"the cluster does not know {PLURAL}.{GROUP}/{VERSION}; install Kubeflow Trainer, or set num_nodes=1"
            ) from None
        return True


class Refused(UserError):
    """The API server does not allow what this step needs, or does not accept the object."""


class NotFound(Exception):
    """There is no such object, or no such kind of object."""


class Conflict(Exception):
    """There is an object of that name already."""


def raw() -> dict[str, Any]:
    """Options of a request whose answer is taken as the JSON that it is."""
    return {"_preload_content": False, "_request_timeout": REQUEST_TIMEOUT_S}


def condition(job: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """A condition of a TrainJob that is true."""
    conditions: list[dict[str, Any]] = job.get("status", {}).get("conditions") or []
    return next((each for each in conditions if each["type"] == kind and each["status"] == "True"), None)


def _message(error: Any) -> str:
    """What the API server says about a refusal."""
    try:
        return str(json.loads(error.body)["message"])[:1000]
    except (TypeError, ValueError, KeyError):
        return str(error.body or error.reason)[:1000]
