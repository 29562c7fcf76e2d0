"""Submits a compiled pipeline to a Kubeflow Pipelines server, and follows its run."""

from __future__ import annotations

import io
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from slmops.errors import ConfigError, SlmopsError, TransientError, UserError, explain_os_errors
from slmops.kubeflow.compile import Compiled
from slmops.kubeflow.follow import Follower

TOKEN = "SLMOPS_KFP_TOKEN"  # noqa: S105 - the name of a variable
"""Environment variable: the bearer token, if the server wants one."""

POLL_S = 5.0
MAX_SILENT_POLLS = 12

T = TypeVar("T")


class Version(NamedTuple):
    """A version of a pipeline on a server."""

    name: str
    pipeline_id: str
    version_id: str


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

    def upload(self, compiled: Compiled) -> Version:
        """The version of the pipeline that holds exactly this compiled file: found, or uploaded."""
        pipeline = self._find_or_make(lambda: self._pipeline(compiled.name), lambda: self._make_pipeline(compiled.name))
        version = self._find_or_make(
            lambda: self._version(pipeline.pipeline_id, compiled.version),
            lambda: self._client.upload_pipeline_version(
                str(compiled.path), compiled.version, pipeline_id=pipeline.pipeline_id
            ),
        )
        return Version(compiled.version, str(pipeline.pipeline_id), str(version.pipeline_version_id))

    def start(
        self,
        version: Version,
        arguments: Mapping[str, Any],
        *,
        experiment: str,
        run_name: str,
        service_account: str | None,
    ) -> str:
        """Start a run of `version` and return its id. The experiment is made if it does not exist."""
        found = self._find_or_make(
            lambda: self._experiment(experiment),
            lambda: self._client.create_experiment(experiment, namespace=self.namespace),
        )
        run = self._ask(
            lambda: self._client.run_pipeline(
                experiment_id=found.experiment_id,
                job_name=run_name,
                pipeline_id=version.pipeline_id,
                version_id=version.version_id,
                params=dict(arguments),
                service_account=service_account,
            )
        )
        return str(run.run_id)

    def cancel(self, run_id: str) -> None:
        """Ask the server to end a run."""
        self._ask(lambda: self._client.terminate_run(run_id))

    def url(self, run_id: str) -> str:
        """Where a browser shows the run."""
        return f"{self.host}/#/runs/details/{run_id}"

    def wait(self, run_id: str, follower: Follower) -> None:
        """Follow a run to its end.

        Raises:
            UserError: the run ended in any other way than success.
            TransientError: the server fell silent; the run itself goes on.
        """
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
            follower.look(run)
            if run.state == "SUCCEEDED":
                return
            if run.state in {"FAILED", "CANCELED", "SKIPPED"}:
                why = follower.why(run)
                raise UserError(
                    f"the run ended as {run.state.lower()}{f': {why}' if why else ''}; see {self.url(run_id)}, or "
                    f"kubectl logs --namespace {self.namespace} --selector pipeline/runid={run_id} --container main"
                )
            time.sleep(POLL_S)

    def _pipeline(self, name: str) -> Any:
        """The pipeline of that name in the namespace, or None."""
        from kfp_server_api import ApiException

        try:
            return self._client.pipelines.pipeline_service_get_pipeline_by_name(name, namespace=self.namespace)
        except ApiException as error:
            if error.status != 404:
                raise
            return None

    def _make_pipeline(self, name: str) -> Any:
        from kfp_server_api import V2beta1Pipeline

        # Not kfp's upload_pipeline: that also makes a version, called like the pipeline whatever is in it.
        pipeline = V2beta1Pipeline(name=name, display_name=name, namespace=self.namespace)
        return self._client.pipelines.pipeline_service_create_pipeline(pipeline)

    def _version(self, pipeline_id: str, name: str) -> Any:
        """The version of that name, or None."""
        wanted = {"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]}
        found = self._client.list_pipeline_versions(pipeline_id, filter=json.dumps(wanted))
        return next(iter(found.pipeline_versions or ()), None)

    def _experiment(self, name: str) -> Any:
        """The experiment of that name, or None."""
        try:
            return self._client.get_experiment(experiment_name=name, namespace=self.namespace)
        except ValueError:  # how kfp's client says that there is none
            return None

    def _find_or_make(self, find: Callable[[], Any], make: Callable[[], Any]) -> Any:
        """What `find` finds, else what `make` makes; if somebody else made it in between, that."""
        if (found := self._ask(find)) is not None:
            return found
        try:
            return self._ask(make)
        except SlmopsError:
            if (found := self._ask(find)) is not None:
                return found
            raise

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
        if status >= 300:
            said = _message(body)
            raise UserError(f"{where}: {said}" if said else f"{where}; is --host the address of Kubeflow Pipelines?")

    def _unreachable(self, error: Exception) -> TransientError:
        return TransientError(f"{self.host} does not answer ({type(error).__name__}); check --host and the network")


def _message(body: str) -> str:
    """The server's own words in an answer that is an error."""
    try:
        content = json.loads(body)
    except ValueError:
        return ""
    said = [str(content[key]) for key in ("message", "error_message") if isinstance(content, dict) and content.get(key)]
    return said[0][:500] if said else ""


def read_token(token_file: Path | None) -> str | None:
    """The token of `--token-file`, else of the environment, else None. It is never an argument: those are public."""
    if token_file is None:
        return os.environ.get(TOKEN) or None
    with explain_os_errors(token_file):
        token = token_file.read_text().strip()
    if not token:
        raise ConfigError(f"{token_file} is empty; put the token into it")
    return token
