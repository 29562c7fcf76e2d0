"""Submits a compiled pipeline to a Kubeflow Pipelines server, and follows its run."""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

from slmops.errors import ConfigError, TransientError, UserError, explain_os_errors
from slmops.kubeflow.compile import Compiled

TOKEN = "SLMOPS_KFP_TOKEN"  # noqa: S105 - the name of a variable
"""Environment variable: the bearer token, if the server wants one."""

POLL_S = 5.0
MAX_SILENT_POLLS = 12

T = TypeVar("T")


class Server:
    """A Kubeflow Pipelines server."""

    def __init__(self, host: str, namespace: str, token: str | None) -> None:
        """Connect.

        Raises:
            TransientError: the server does not answer.
            UserError: it answers, and refuses, or is something else.
        """
        self.host = host.rstrip("/")
        if not self.host.startswith(("http://", "https://")):
            raise ConfigError(f"--host must start with http:// or https://, got {host!r}")
        self.namespace = namespace
        self._check_health(token)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that the client needs a KFP server of version 2
            from kfp import Client

            self._client = self._ask(lambda: Client(host=self.host, namespace=namespace, existing_token=token))

    def submit(self, compiled: Compiled, arguments: Mapping[str, Any], *, experiment: str, run_name: str | None) -> str:
        """Start a run and return its id. The experiment is made if it does not exist."""
        found = self._ask(lambda: self._client.create_experiment(experiment, namespace=self.namespace))
        run = self._ask(
            lambda: self._client.run_pipeline(
                experiment_id=found.experiment_id,
                job_name=run_name or f"{compiled.name} {time.strftime('%Y-%m-%d %H:%M:%S')}",
                pipeline_package_path=str(compiled.path),
                params=dict(arguments),
            )
        )
        return str(run.run_id)

    def url(self, run_id: str) -> str:
        """Where a browser shows the run."""
        return f"{self.host}/#/runs/details/{run_id}"

    def wait(self, run_id: str, say: Callable[[str], None]) -> None:
        """Follow a run to its end, and say when a task changes its state.

        Raises:
            UserError: the run ended in any other way than success.
            TransientError: the server fell silent; the run itself goes on.
        """
        states: dict[str, str] = {}
        silent = 0
        while True:
            try:
                run = self._ask(lambda: self._client.get_run(run_id))
                silent = 0
            except TransientError:
                silent += 1
                if silent > MAX_SILENT_POLLS:
                    raise
                time.sleep(POLL_S)
                continue
            for task in (run.run_details.task_details if run.run_details else None) or ():
                if task.state and states.get(task.task_id) != task.state:
                    states[task.task_id] = task.state
                    say(f"{task.display_name}: {task.state.lower()}")
            if run.state == "SUCCEEDED":
                return
            if run.state in {"FAILED", "CANCELED", "SKIPPED"}:
                why = f": {run.error.message}" if run.error and run.error.message else ""
                raise UserError(f"the run ended as {run.state.lower()}{why}; see {self.url(run_id)}")
            time.sleep(POLL_S)

    def _check_health(self, token: str | None) -> None:
        """One plain request first: kfp's client would repeat a refused one for half a minute."""
        import urllib3

        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = urllib3.PoolManager(retries=False, timeout=10).request(
                "GET", f"{self.host}/apis/v2beta1/healthz", headers=headers
            )
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(error) from None
        self._check_status(answer.status)

    def _ask(self, request: Callable[[], T]) -> T:
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        try:
            with redirect_stdout(io.StringIO()):  # kfp's client prints addresses of its own
                return request()
        except ApiException as error:
            self._check_status(error.status or 0, str(error.body or ""))
            raise
        except HTTPError as error:
            raise self._unreachable(error) from None

    def _check_status(self, status: int, body: str = "") -> None:
        where = f"{self.host} answered {status}"
        if status == 401:
            raise UserError(
                f"{where} (not logged in); put a valid token into a file for --token-file, or into ${TOKEN}"
            )
        if status == 403:
            raise UserError(
                f"{where} (not allowed); ask for access to namespace {self.namespace}, or give another --namespace"
            )
        if status == 429 or status >= 500:
            raise TransientError(f"{where}; try again later")
        if status >= 400 or 300 <= status < 400:
            raise UserError(f"{where}{': ' + body[:500] if body else ''}; is --host the address of Kubeflow Pipelines?")

    def _unreachable(self, error: Exception) -> TransientError:
        return TransientError(f"{self.host} does not answer ({type(error).__name__}); check --host and the network")


def read_token(token_file: Path | None) -> str | None:
    """The token of `--token-file`, else of the environment, else None. It is never an argument: those are public."""
    if token_file is None:
        return os.environ.get(TOKEN) or None
    with explain_os_errors(token_file):
        token = token_file.read_text().strip()
    if not token:
        raise ConfigError(f"{token_file} is empty; put the token into it")
    return token
