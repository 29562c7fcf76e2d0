"""A double of the Kubernetes API server: TrainJobs, pods, their logs and events, as far as following a TrainJob goes.

It is no Kubernetes: nothing is scheduled, and what a controller would do (conditions, pods, events) a test does by
hand or with `run_for_real`, which starts the TrainJob's own command as local processes. It is strict where the real
server is: objects are validated against the published schema with unknown fields refused, names are taken once (409), a
watch begins at a resourceVersion, ends in 410 if that is too old, and ends in time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from slmops.kubeflow.trainjob import INDEX_LABEL, NODE, POD_LABEL
from tests import crds

NAMESPACE = "team"
TRAINJOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
EVENTS = f"/api/v1/namespaces/{NAMESPACE}/events"


@dataclass
class Log:
    """Lines of a container with the times at which they were written."""

    lines: list[tuple[float, str]] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.lines.append((time.time(), text))


class ApiServer:
    """What is in the cluster, what was asked, and how the server misbehaves."""

    def __init__(self) -> None:
        self.url = ""
        self.changed = threading.Condition()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, Log] = {}
        self.events: list[dict[str, Any]] = []
        self.history: list[tuple[int, str, dict[str, Any]]] = []
        """(resourceVersion, type, object) of all changes of TrainJobs."""
        self.version = 100
        self.oldest = 0
        """A watch from an older version gets 410."""
        self.requests: list[tuple[str, str]] = []
        self.faults: list[int] = []
        """Statuses of the next answers; 0 closes the connection without one."""
        self.broken_watches = 0
        """How many of the next watches are cut off in the middle of a line."""
        self.forbidden: set[str] = set()
        """Last parts of paths that are refused with 403."""
        self.knows_trainjobs = True
        self.stubborn = False
        """If set, a deleted TrainJob stays, as one with a finalizer does."""
        self.on_create: Callable[[dict[str, Any]], None] = lambda job: None
        self.on_delete: Callable[[dict[str, Any]], None] = lambda job: None

    # What controllers do.

    def set_condition(self, name: str, kind: str, reason: str = "Because", message: str = "", on: bool = True) -> None:
        with self.changed:
            job = self.jobs.get(name)
            if job is None:
                return
            conditions = job.setdefault("status", {}).setdefault("conditions", [])
            conditions[:] = [condition for condition in conditions if condition["type"] != kind]
            conditions.append(
                {
                    "type": kind,
                    "status": "True" if on else "False",
                    "reason": reason,
                    "message": message,
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }
            )
            self._record("MODIFIED", job)

    def set_pod(self, job: str, index: int, phase: str, **container: Any) -> str:
        """Create or change the pod of a node; `container` is its container's `state`. Returns the pod's name."""
        name = f"{job}-node-0-{index}-abcde"
        status: dict[str, Any] = {"phase": phase}
        if container:
            status["containerStatuses"] = [{"name": NODE, **container}]
        labels = {POD_LABEL: job, INDEX_LABEL: str(index)}
        with self.changed:
            self.pods[name] = {"metadata": {"name": name, "labels": labels}, "status": status}
            self.logs.setdefault(name, Log())
        return name

    def warn(self, about: str, reason: str, message: str) -> None:
        self.events.append(
            {
                "metadata": {"name": f"event-{len(self.events)}"},
                "type": "Warning",
                "reason": reason,
                "message": message,
                "involvedObject": {"kind": "Pod", "name": about},
            }
        )

    def finish(self, name: str) -> None:
        self.set_condition(name, "Complete", "JobsCompleted", "jobset completed successfully")

    def fail(self, name: str) -> None:
        self.set_condition(name, "Failed", "JobsFailed", "jobset failed due to one or more job failures")

    # What clients ask.

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        """Status and JSON (or, for a log, text)."""
        if path.rpartition("/")[2] in self.forbidden:
            return 403, _status(403, "Forbidden", f"User cannot {method.lower()} {path.rpartition('/')[2]}")
        if path.startswith(TRAINJOBS):
            if not self.knows_trainjobs:
                return 404, "404 page not found\n"
            return self._trainjobs(method, path.removeprefix(TRAINJOBS).lstrip("/"), query, body)
        if method == "GET" and path == EVENTS:
            wanted = dict(pair.split("=") for pair in query.get("fieldSelector", "").split(",") if pair)
            return 200, {"kind": "EventList", "items": [e for e in self.events if e["type"] == wanted.get("type")]}
        if method == "GET" and path == PODS:
            key, _, value = query.get("labelSelector", "").partition("=")
            found = [pod for pod in self.pods.values() if pod["metadata"]["labels"].get(key) == value]
            return 200, {"kind": "PodList", "items": found}
        if method == "GET" and (match := re.fullmatch(f"{PODS}/([^/]+)/log", path)) and match[1] in self.logs:
            return 200, self._log(self.logs[match[1]], query)
        if method == "GET" and (match := re.fullmatch(f"{PODS}/([^/]+)", path)) and match[1] in self.pods:
            return 200, self.pods[match[1]]
        return 404, _status(404, "NotFound", f"{path} not found")

    def changes_since(self, version: int, name: str, until: float) -> Iterator[dict[str, Any]]:
        """Watch events, waited for until the time `until`."""
        if version < self.oldest:
            yield {"type": "ERROR", "object": _status(410, "Expired", "too old resource version")}
            return
        while True:
            with self.changed:
                news = [each for each in self.history if each[0] > version and each[2]["metadata"]["name"] == name]
                if not news:
                    left = until - time.monotonic()
                    if left <= 0 or not self.changed.wait(min(left, 0.5)):
                        if time.monotonic() >= until:
                            return
                        continue
            for version, kind, job in news:  # noqa: B007 - where the next look begins
                yield {"type": kind, "object": job}

    def _trainjobs(self, method: str, name: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        with self.changed:
            match method, bool(name):
                case "POST", False:
                    return self._create(body)
                case "GET", False:
                    items = list(self.jobs.values())
                    return 200, {"kind": "TrainJobList", "metadata": {"resourceVersion": "1"}, "items": items}
            job = self.jobs.get(name)
            if job is None:
                return 404, _status(404, "NotFound", f'trainjobs "{name}" not found')
            if method == "DELETE":
                assert query.get("propagationPolicy") == "Foreground", "else pods may outlive the TrainJob"
                job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
                self._record("MODIFIED", job)
                if not self.stubborn:
                    self.remove(name)
        return 200, job

    def remove(self, name: str) -> None:
        """A deleted TrainJob's end."""
        with self.changed:
            job = self.jobs.pop(name)
            self.on_delete(job)
            self.pods = {n: p for n, p in self.pods.items() if p["metadata"]["labels"].get(POD_LABEL) != name}
            self._record("DELETED", job)

    def _create(self, body: dict[str, Any]) -> tuple[int, Any]:
        if wrong := crds.problems(body):
            return 422, _status(422, "Invalid", "; ".join(wrong))
        name = body["metadata"]["name"]
        if name in self.jobs:
            return 409, _status(409, "AlreadyExists", f'trainjobs "{name}" already exists')
        self.jobs[name] = body
        self._record("ADDED", body)
        self.on_create(body)
        return 201, body

    def _record(self, kind: str, job: dict[str, Any]) -> None:
        self.version += 1
        job["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, kind, json.loads(json.dumps(job))))
        self.changed.notify_all()

    @staticmethod
    def _log(log: Log, query: dict[str, str]) -> str:
        lines = list(log.lines)
        if "sinceSeconds" in query:
            lines = [line for line in lines if line[0] >= time.time() - int(query["sinceSeconds"])]
        if "tailLines" in query:
            lines = lines[-int(query["tailLines"]) :]
        stamped = query.get("timestamps", "").lower() == "true"
        return "".join(f"{_rfc3339(at)} {text}\n" if stamped else f"{text}\n" for at, text in lines)


@contextmanager
def api_server(directory: Path, served: ApiServer | None = None) -> Iterator[ApiServer]:
    """Serve a double on loopback; `directory/kubeconfig` leads a client to it."""
    double = served or ApiServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            double.requests.append((self.command, url.path + ("?watch" if "watch" in query else "")))
            if double.faults:
                fault = double.faults.pop(0)
                if fault == 0:
                    self.close_connection = True
                    return
                self._send(fault, _status(fault, "Fault", "as the test wants it"))
            elif query.get("watch", "").lower() == "true":
                self._watch(query)
            else:
                self._send(*double.answer(self.command, url.path, query, body))

        do_GET = do_POST = do_DELETE = _handle  # noqa: N815

        def _send(self, status: int, content: Any) -> None:
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _watch(self, query: dict[str, str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if double.broken_watches:
                double.broken_watches -= 1
                self._chunk(b'{"type": "MODI')
                self.close_connection = True
                return
            name = query["fieldSelector"].removeprefix("metadata.name=")
            until = time.monotonic() + float(query["timeoutSeconds"])
            try:
                for event in double.changes_since(int(query["resourceVersion"]), name, until):
                    self._chunk(json.dumps(event).encode() + b"\n")
                self.wfile.write(b"0\r\n\r\n")
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    double.url = f"http://127.0.0.1:{server.server_port}"
    _write_kubeconfig(directory / "kubeconfig", double.url)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _write_kubeconfig(path: Path, url: str) -> None:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "double",
        "clusters": [{"name": "double", "cluster": {"server": url}}],
        "users": [{"name": "step", "user": {"token": "t"}}],
        "contexts": [{"name": "double", "context": {"cluster": "double", "user": "step", "namespace": NAMESPACE}}],
    }
    path.write_text(yaml.safe_dump(config))


def run_for_real(double: ApiServer, job: dict[str, Any], port: int, directory: Path) -> list[subprocess.Popen[str]]:
    """Start the TrainJob's command once per node on this machine, with the environment that the torch policy gives.

    Pods, their logs and the TrainJob's end follow the processes. Each node is a process group, as a pod is: a signal to
    it reaches torchrun and the training alike.
    """
    name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
    processes = []
    for index in range(trainer["numNodes"]):
        policy = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(index),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
            "SLMOPS_TERMINATION_LOG": str(directory / f"termination-{index}"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }
        env = {each["name"]: each["value"] for each in trainer["env"] if "value" in each}
        command = [*trainer["command"], *trainer["args"]]
        process = subprocess.Popen(
            command,
            env=os.environ | env | policy,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        pod = double.set_pod(name, index, "Running")
        threading.Thread(target=_keep_log, args=(process, double.logs[pod]), daemon=True).start()
    threading.Thread(target=_follow, args=(double, name, processes, directory), daemon=True).start()
    return processes


def _keep_log(process: subprocess.Popen[str], log: Log) -> None:
    assert process.stdout
    with process.stdout as lines:
        for line in lines:
            log.add(line.rstrip("\n"))


def _follow(double: ApiServer, name: str, processes: list[subprocess.Popen[str]], directory: Path) -> None:
    """What kubelet, JobSet and Trainer do when containers end: one that failed ends the others."""
    left = dict(enumerate(processes))
    failed = False
    while left:
        time.sleep(0.1)
        for index, process in list(left.items()):
            code = process.poll()
            if code is None:
                continue
            del left[index]
            message = directory / f"termination-{index}"
            ended: dict[str, Any] = {
                "exitCode": code if code >= 0 else 128 - code,
                "reason": "Error" if code else "Completed",
                "message": message.read_text() if message.exists() else "",
                "finishedAt": _rfc3339(time.time()),
            }
            double.set_pod(name, index, "Failed" if code else "Succeeded", state={"terminated": ended})
            if code and not failed:
                failed = True
                for other in left.values():
                    other.terminate()
    (double.fail if failed else double.finish)(name)


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _status(code: int, reason: str, message: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }
