"""A double of the Kubeflow Pipelines REST API (v2beta1): as much as submitting and following a run takes.

It is no Kubeflow: it checks the requests that slmops sends, and nothing that a server would do with them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API = "/apis/v2beta1"


class KfpDouble:
    """What it was asked, and how it answers."""

    def __init__(self) -> None:
        self.host = ""
        self.token = ""
        """If set, requests need it."""
        self.refuse_with = 0
        """If set, the status of every answer."""
        self.states = ["PENDING", "RUNNING", "SUCCEEDED"]
        """The states of the run, one per question."""
        self.experiments: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.authorizations: set[str] = set()

    def answer(self, method: str, path: str, body: Any, authorization: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer."""
        self.authorizations.add(authorization)
        if self.refuse_with:
            return self.refuse_with, {"error": "refused"}
        if self.token and authorization != f"Bearer {self.token}":
            return 401, {"error": "not logged in"}
        match method, path.partition("?")[0].removeprefix(API):
            case "GET", "/healthz":
                return 200, {"multi_user": True}
            case "GET", "/experiments":
                return 200, {"experiments": self.experiments}
            case "POST", "/experiments":
                self.experiments.append(body | {"experiment_id": "experiment-1"})
                return 200, self.experiments[-1]
            case "POST", "/runs":
                self.runs.append(body)
                return 200, body | {"run_id": "run-1", "state": "PENDING"}
            case "GET", "/runs/run-1":
                return 200, self._run()
        return 404, {"error": f"{method} {path}"}

    def _run(self) -> dict[str, Any]:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        task = {"task_id": "t", "display_name": "publish", "state": state}
        run: dict[str, Any] = {"run_id": "run-1", "state": state, "run_details": {"task_details": [task]}}
        if state == "FAILED":
            run["error"] = {"code": 3, "message": "publish: the verdict is fail"}
        return run


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
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, content = double.answer(method, self.path, body, self.headers.get("Authorization", ""))
            data = json.dumps(content).encode()
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
