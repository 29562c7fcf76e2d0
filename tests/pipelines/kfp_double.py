"""A double of the Kubeflow Pipelines REST API (v2beta1): as much as submitting and following a run takes.

It is no Kubeflow: nothing runs. What it takes and gives is that of the published API, because requests are read into
and answers are written from the classes of `kfp_server_api`, and the paths are held against those that its clients
call (test_submit.py). What goes beyond names and types follows the server's source: names are unique (409), look-ups
by name answer 404, lists are filtered and come in pages, and a run's task_details are the nodes of its workflow.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api as api
from kfp_server_api import V2beta1RuntimeState as State

API = "/apis/v2beta1"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
MAX_PAGE_SIZE = 200

Answer = tuple[int, Any]


class KfpDouble:
    """What it was asked, and how it answers."""

    def __init__(self) -> None:
        self.host = ""
        self.token = ""
        """If set, requests need it."""
        self.refuse_with = 0
        """If set, the status of every answer."""
        self.silent_for = 0
        """So many questions about a run are answered with 503."""
        self.looks: list[api.V2beta1Run] = [run(State.PENDING), run(State.RUNNING), run(State.SUCCEEDED)]
        """What is said of the run, one per question; the last one again and again."""
        self.race: threading.Barrier | None = None
        """If set, whoever makes something waits there for the others."""
        self.experiments: list[api.V2beta1Experiment] = []
        self.pipelines: list[api.V2beta1Pipeline] = []
        self.versions: list[api.V2beta1PipelineVersion] = []
        self.uploads: list[bytes] = []
        self.runs: list[api.V2beta1Run] = []
        self.terminated: list[str] = []
        self.authorizations: set[str] = set()
        self._lock = threading.Lock()

    def answer(self, method: str, address: str, headers: Any, content: bytes) -> Answer:
        """Status and content (a model of the API, or what is no model) of an answer."""
        parts = urlsplit(address)
        self.authorizations.add(headers.get("Authorization", ""))
        if self.refuse_with:
            return self.refuse_with, {"error": "refused"}
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error": "not logged in"}
        for (wanted, template), handler in ROUTES.items():
            pattern = re.sub(r"\\{[\w.]+\\}", "([^/]+)", re.escape(template)) + "$"
            if method == wanted and (match := re.match(pattern, parts.path)):
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                request = SimpleNamespace(query=query, headers=headers, content=content)
                if method == "POST" and self.race and handler in MAKERS:
                    self.race.wait(timeout=60)
                with self._lock:
                    return handler(self, request, *map(unquote, match.groups()))
        return _error(404, f"Not Found: {method} {parts.path}")

    def healthz(self, request: Any) -> Answer:
        return 200, api.V2beta1GetHealthzResponse(multi_user=True)

    def list_experiments(self, request: Any) -> Answer:
        found = [e for e in self.experiments if e.namespace == request.query.get("namespace")]
        page, token = _page(found, request.query)
        return 200, api.V2beta1ListExperimentsResponse(experiments=page, next_page_token=token, total_size=len(found))

    def create_experiment(self, request: Any) -> Answer:
        asked = _read(request.content, "V2beta1Experiment")
        if any((e.display_name, e.namespace) == (asked.display_name, asked.namespace) for e in self.experiments):
            return _error(409, f"Already exist error: Experiment {asked.display_name} already exists")
        asked.experiment_id = f"experiment-{len(self.experiments) + 1}"
        self.experiments.append(asked)
        return 200, asked

    def get_pipeline_by_name(self, request: Any, name: str) -> Answer:
        wanted = (name, request.query.get("namespace"))
        found = next((p for p in self.pipelines if (p.name, p.namespace) == wanted), None)
        return (200, found) if found else _error(404, f"Pipeline {name} not found")

    def create_pipeline(self, request: Any) -> Answer:
        asked = _read(request.content, "V2beta1Pipeline")
        if not asked.name:
            return _error(400, "Invalid input error: name is required")
        if any((p.name, p.namespace) == (asked.name, asked.namespace) for p in self.pipelines):
            return _error(409, f"Already exist error: pipeline {asked.name} already exists")
        asked.pipeline_id = f"pipeline-{len(self.pipelines) + 1}"
        self.pipelines.append(asked)
        return 200, asked

    def list_versions(self, request: Any, pipeline_id: str) -> Answer:
        page, token = _page([v for v in self.versions if v.pipeline_id == pipeline_id], request.query)
        return 200, api.V2beta1ListPipelineVersionsResponse(pipeline_versions=page, next_page_token=token)

    def upload_version(self, request: Any) -> Answer:
        name, pipeline_id = request.query["name"], request.query["pipelineid"]
        head = f"Content-Type: {request.headers['Content-Type']}\n\n".encode()
        parts: Any = message_from_bytes(head + request.content).get_payload()
        if [part.get_param("name", header="Content-Disposition") for part in parts] != ["uploadfile"]:
            return 400, {"error_message": "Failed to create a pipeline version", "error_details": "no uploadfile"}
        if all(p.pipeline_id != pipeline_id for p in self.pipelines):
            return 400, {"error_message": "Failed to create a pipeline version", "error_details": "no such pipeline"}
        if any((v.name, v.pipeline_id) == (name, pipeline_id) for v in self.versions):
            return 409, {"error_message": "Failed to create a pipeline version", "error_details": "already exists"}
        self.uploads.append(parts[0].get_payload(decode=True))
        return 200, self.add_version(pipeline_id, name)

    def add_version(self, pipeline_id: str, name: str) -> api.V2beta1PipelineVersion:
        """Make a version without an upload."""
        made = api.V2beta1PipelineVersion(
            pipeline_id=pipeline_id,
            pipeline_version_id=f"version-{len(self.versions) + 1}",
            name=name,
            display_name=name,
            created_at=NOW,
        )
        self.versions.append(made)
        return made

    def create_run(self, request: Any) -> Answer:
        asked = _read(request.content, "V2beta1Run")
        wanted = asked.pipeline_version_reference
        known = {(v.pipeline_id, v.pipeline_version_id) for v in self.versions}
        if not wanted or (wanted.pipeline_id, wanted.pipeline_version_id) not in known:
            return _error(404, "PipelineVersion not found")
        if all(e.experiment_id != asked.experiment_id for e in self.experiments):
            return _error(404, f"Experiment {asked.experiment_id} not found")
        asked.run_id, asked.state = "run-1", State.PENDING
        self.runs.append(asked)
        return 200, asked

    def get_run(self, request: Any, run_id: str) -> Answer:
        if run_id != "run-1":
            return _error(404, f"Run {run_id} not found")
        if self.silent_for:
            self.silent_for -= 1
            return _error(503, "upstream connect error")
        return 200, self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def terminate_run(self, request: Any, run_id: str) -> Answer:
        if run_id != "run-1":
            return _error(404, f"Run {run_id} not found")
        self.terminated.append(run_id)
        return 200, {}


ROUTES: dict[tuple[str, str], Callable[..., Answer]] = {
    ("GET", f"{API}/healthz"): KfpDouble.healthz,
    ("GET", f"{API}/experiments"): KfpDouble.list_experiments,
    ("POST", f"{API}/experiments"): KfpDouble.create_experiment,
    ("GET", f"{API}/pipelines/names/{{name}}"): KfpDouble.get_pipeline_by_name,
    ("POST", f"{API}/pipelines"): KfpDouble.create_pipeline,
    ("GET", f"{API}/pipelines/{{pipeline_id}}/versions"): KfpDouble.list_versions,
    ("POST", f"{API}/pipelines/upload_version"): KfpDouble.upload_version,
    ("POST", f"{API}/runs"): KfpDouble.create_run,
    ("GET", f"{API}/runs/{{run_id}}"): KfpDouble.get_run,
    ("POST", f"{API}/runs/{{run_id}}:terminate"): KfpDouble.terminate_run,
}
MAKERS = (KfpDouble.create_experiment, KfpDouble.create_pipeline, KfpDouble.upload_version)


def published() -> set[tuple[str, str]]:
    """(method, path) of every call that kfp_server_api's clients can make."""
    calls: set[tuple[str, str]] = set()

    class Recorder(api.ApiClient):  # type: ignore[misc]
        def call_api(self, resource_path: str, method: str, *_: object, **__: object) -> None:
            calls.add((method, resource_path))

    services: list[tuple[str, Any]] = inspect.getmembers(api, inspect.isclass)
    for name, service in services:
        if name.endswith("ServiceApi"):
            for method, function in inspect.getmembers(service, inspect.isfunction):
                if method.endswith("_with_http_info"):
                    needed = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
                    function(service(Recorder()), *["x"] * (len(needed) - 1))
    return calls


def run(state: str, *nodes: api.V2beta1PipelineTaskDetail, error: str = "") -> api.V2beta1Run:
    """A look at the run."""
    return api.V2beta1Run(
        run_id="run-1",
        experiment_id="experiment-1",
        display_name="mine",
        created_at=NOW,
        state=state,
        error=_status(error),
        run_details=api.V2beta1RunDetails(task_details=list(nodes)),
    )


def node(name: str, state: str, *, children: tuple[str, ...] = (), error: str = "", node_id: str = "") -> Any:
    """A node of the workflow; its id is its name, unless another is given."""
    return api.V2beta1PipelineTaskDetail(
        run_id="run-1",
        task_id=node_id or name,
        display_name=name,
        create_time=NOW,
        state=state,
        error=_status(error),
        child_tasks=[api.PipelineTaskDetailChildTask(task_id=child) for child in children],
    )


def step(name: str, state: str, executor: str, error: str = "") -> tuple[Any, ...]:
    """The nodes of one step: what resolves its inputs, the step, and its pod."""
    pod = f"{name}-pod"
    return (
        node(f"{name}-driver", State.SUCCEEDED),
        node(name, state, children=(pod,), error=error),
        node("executor", executor, node_id=pod),
    )


@contextmanager
def kfp_double() -> Iterator[KfpDouble]:
    """Serve a double on loopback."""
    double = KfpDouble()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, method: str) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = double.answer(method, self.path, self.headers, content)
            data = json.dumps(api.ApiClient().sanitize_for_serialization(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    double.host = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _read(content: bytes, model: str) -> Any:
    """A request's body as a model; a body with a field that the model has not is a mistake of the client."""
    read = api.ApiClient().deserialize(SimpleNamespace(data=content), model)
    assert api.ApiClient().sanitize_for_serialization(read) == json.loads(content), f"not a {model}: {content!r}"
    return read


def _page(found: list[Any], query: dict[str, str]) -> tuple[list[Any], str | None]:
    """The page of `found` that a query asks for, after its filter, and the token of the next one."""
    for predicate in json.loads(query.get("filter", "{}")).get("predicates", []):
        # kfp's client writes the number of EQUALS for experiments, and its name may be written, too.
        assert predicate["operation"] in (1, "EQUALS"), predicate
        value = predicate.get("stringValue") or predicate["string_value"]
        found = [item for item in found if getattr(item, predicate["key"]) == value]
    size = min(int(query.get("page_size") or 20), MAX_PAGE_SIZE)
    start = int(query.get("page_token") or 0)
    return found[start : start + size], str(start + size) if start + size < len(found) else None


def _status(message: str) -> Any:
    return api.GoogleRpcStatus(code=3, message=message) if message else None


def _error(status: int, message: str) -> Answer:
    """An error as the server's gateway writes it."""
    return status, {"error": message, "code": status, "message": message, "details": []}
