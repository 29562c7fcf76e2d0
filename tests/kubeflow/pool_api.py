"""A double of the Kubernetes API server as far as measuring on a pool goes: Jobs, their pods, logs and events.

It is no Kubernetes: nothing is scheduled. What the scheduler and a kubelet would do a test does by hand with `set_pod`,
or with `run_for_real`, which starts the pod's own command as a local process. It is strict where the real server is:
Jobs are validated against the published schema with unknown fields refused, and names are taken once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from slmops.kubeflow.pool_job import CONTAINER, JOB_LABEL
from tests.kubeflow.api_server import NAMESPACE, ApiServer, Log, _status
from tests.manifests.rendering import Resource
from tests.manifests.validation import check

JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
NODE = "edge-7"


class PoolApi(ApiServer):
    """What is in the cluster, and what was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.created: list[dict[str, Any]] = []
        """Every Job that there was."""

    @property
    def pod_name(self) -> str:
        return f"{self.created[-1]['metadata']['name']}-abcde"

    def set_pod_of(self, job: str, phase: str, *, log: str | None = None, **status: Any) -> None:
        """Create or change the pod of a Job; `container` in `status` is its container's `state`."""
        container = status.pop("container", None)
        if container:
            status["containerStatuses"] = [{"name": CONTAINER, "state": container}]
        name = f"{job}-abcde"
        with self.changed:
            self.pods[name] = {
                "metadata": {"name": name, "labels": {JOB_LABEL: job}},
                "spec": {"nodeName": NODE} if phase != "Pending" else {},
                "status": {"phase": phase, **status},
            }
            kept = self.logs.setdefault(name, Log())
        for line in (log or "").splitlines():
            kept.add(line)

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        if not path.startswith(JOBS) or "jobs" in self.forbidden:
            return super().answer(method, path, query, body)
        name = path.removeprefix(JOBS).lstrip("/")
        with self.changed:
            if method == "POST":
                return self._create_job(body)
            job = self.jobs.get(name)
            if job is None:
                return 404, _status(404, "NotFound", f'jobs.batch "{name}" not found')
            if method == "DELETE":
                del self.jobs[name]
                self.pods.pop(f"{name}-abcde", None)
        return 200, job

    def _create_job(self, body: dict[str, Any]) -> tuple[int, Any]:
        if wrong := check(Resource("request", body)):
            return 422, _status(422, "Invalid", "; ".join(map(str, wrong)))
        name = body["metadata"]["name"]
        if name in self.jobs:
            return 409, _status(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
        self.jobs[name] = body
        self.created.append(body)
        self.on_create(body)
        return 201, body


def run_for_real(double: PoolApi, secret: Mapping[str, str]) -> Callable[[dict[str, Any]], None]:
    """What a node does with a Job's pod: run its command, with the variables of its secret, and tell how it ended."""

    def start(job: dict[str, Any]) -> None:
        threading.Thread(target=_run, args=(double, job, secret), daemon=True).start()

    return start


def _run(double: PoolApi, job: dict[str, Any], secret: Mapping[str, str]) -> None:
    name = job["metadata"]["name"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    double.set_pod_of(name, "Pending", container={"waiting": {"reason": "ContainerCreating"}})
    env = {each["name"]: each["value"] for each in container["env"]}
    message = os.path.join(os.environ["SLMOPS_TEST_POD_FILES"], "termination-log")
    double.set_pod_of(name, "Running", container={"running": {}})
    ended = subprocess.run(
        [sys.executable, *container["command"][1:], *container["args"]],
        env={"PATH": os.environ["PATH"], "SLMOPS_TERMINATION_LOG": message, **env, **secret},
        capture_output=True,
        text=True,
    )
    state = {"exitCode": ended.returncode, "reason": "Error" if ended.returncode else "Completed"}
    if os.path.exists(message):
        with open(message) as file:
            state["message"] = file.read()
    phase = "Failed" if ended.returncode else "Succeeded"
    double.set_pod_of(name, phase, log=ended.stderr + ended.stdout, container={"terminated": state})


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)
