"""`slmops submit`, against a double of the Kubeflow Pipelines API (kfp_double.py), which is no Kubeflow."""

from __future__ import annotations

import hashlib
import importlib.util
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from slmops.cli import app
from slmops.errors import ConfigError, TransientError, UserError
from slmops.kubeflow import submit
from slmops.kubeflow.compile import prepare

_SPEC = importlib.util.spec_from_file_location("kfp_double", Path(__file__).parent / "kfp_double.py")
assert _SPEC
assert _SPEC.loader
_kfp_double = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_kfp_double)
State, run, node, step = _kfp_double.State, _kfp_double.run, _kfp_double.node, _kfp_double.step

PARAMETERS = {"data_uri": "s3://b/rows.csv", "base_model_uri": "s3://b/base", "store_uri": "s3://b/edge"}
SETTINGS = [argument for name, value in PARAMETERS.items() for argument in ("--set", f"{name}={value}")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, compiled once: that takes a second."""
    return prepare("distill_to_edge", None, [], tmp_path_factory.mktemp("compiled") / "distill.yaml")[0].path


@pytest.fixture
def double(compiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("HOME", str(tmp_path))  # kfp's client keeps a context below it
    monkeypatch.delenv(submit.TOKEN, raising=False)
    monkeypatch.setattr(submit, "POLL_S", 0.01)
    with _kfp_double.kfp_double() as served:
        served.pipeline = str(compiled)
        yield served


def _command(double: Any, *arguments: str) -> list[str]:
    return ["submit", double.pipeline, "--host", double.host, *SETTINGS, *arguments]


def _submit(double: Any, *arguments: str) -> Result:
    return CliRunner().invoke(app, _command(double, *arguments))


def _told(result: Result) -> list[str]:
    """The lines of --wait, without the time in front."""
    return [line.partition("  ")[2] for line in result.output.splitlines()[2:]]


def test_the_double_serves_only_what_the_published_api_has() -> None:
    assert set(_kfp_double.ROUTES) <= _kfp_double.published()


def test_a_run_of_an_uploaded_version_is_started_with_its_parameters(double: Any) -> None:
    double.pipeline = "distill_to_edge"
    result = _submit(
        double, "--namespace", "ml", "--experiment", "first", "--run-name", "mine", "--service-account", "slmops-steps"
    )

    assert result.exit_code == 0, result.exception
    (upload,) = double.uploads
    name = f"distill-to-edge-{hashlib.sha256(upload).hexdigest()[:12]}"
    assert result.output == f"version: {name}\nrun: {double.host}/#/runs/details/run-1\n"
    assert next(yaml.safe_load_all(upload))["pipelineInfo"]["name"] == "distill-to-edge"
    (pipeline,), (version,), (started,) = double.pipelines, double.versions, double.runs
    assert (pipeline.name, pipeline.namespace) == ("distill-to-edge", "ml")
    assert (version.name, version.pipeline_id) == (name, pipeline.pipeline_id)
    assert started.pipeline_version_reference.pipeline_version_id == version.pipeline_version_id
    assert (started.display_name, started.service_account) == ("mine", "slmops-steps")
    assert started.runtime_config.parameters == PARAMETERS
    (experiment,) = double.experiments
    assert (experiment.display_name, experiment.namespace) == ("first", "ml")


def test_the_same_content_is_the_same_version_and_other_content_another(double: Any) -> None:
    versions = [_submit(double, *more).output.splitlines()[0] for more in ((), (), ("--no-cache",))]
    assert versions[0] == versions[1] != versions[2]
    assert (len(double.pipelines), len(double.experiments)) == (1, 1)
    assert [len(double.versions), len(double.uploads), len(double.runs)] == [2, 2, 3]
    (cached, placed), (uncached, still_placed) = (list(yaml.safe_load_all(upload)) for upload in double.uploads)
    options = [[bool(t.get("cachingOptions")) for t in s["root"]["dag"]["tasks"].values()] for s in (cached, uncached)]
    assert any(options[0])
    assert not any(options[1]), "--no-cache is part of the version"
    assert placed == still_placed


def test_an_old_version_is_found_among_many(double: Any) -> None:
    assert _submit(double).exit_code == 0
    for number in range(250):
        double.versions.insert(0, double.add_version("pipeline-1", f"other-{number}"))
    assert _submit(double).exit_code == 0
    assert len(double.uploads) == 1


def test_two_submitters_at_once_share_what_is_made(double: Any, tmp_path: Path) -> None:
    double.race = threading.Barrier(2)
    command = [sys.executable, "-m", "slmops.cli", *_command(double)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [len(double.pipelines), len(double.versions), len(double.experiments), len(double.runs)] == [1, 1, 1, 2]


def test_wait_tells_how_the_steps_go(double: Any) -> None:
    root = node("distill-to-edge-x7k2p", State.RUNNING), node("root-driver", State.SUCCEEDED)
    double.looks = [
        run(State.PENDING),
        run(State.RUNNING, *root, *step("preflight", State.RUNNING, State.PENDING)),
        run(State.RUNNING, *root, *step("preflight", State.SUCCEEDED, State.SUCCEEDED)),
        run(
            State.RUNNING,
            *root,
            node("prepare-data-driver", State.RUNNING),
            node("finetune", "RUNTIME_STATE_UNSPECIFIED"),
        ),
        run(State.RUNNING, *root, *step("prepare-data", State.SUCCEEDED, State.SKIPPED)),
        run(State.RUNNING, *root, *step("finetune", State.RUNNING, State.RUNNING)),
        run(State.SUCCEEDED, *root, *step("finetune", State.SUCCEEDED, State.SUCCEEDED), node("gate", State.SKIPPED)),
    ]
    result = _submit(double, "--wait")
    assert result.exit_code == 0, result.exception
    assert _told(result) == [
        "preflight: running",
        "preflight: succeeded",
        "prepare-data: cached",
        "finetune-teacher: running",
        "finetune-teacher: succeeded",
        "gate: skipped",
        "succeeded",
    ]
    assert all(line.startswith("0:00:0") for line in result.output.splitlines()[2:])


def test_wait_tells_which_step_failed_and_why(double: Any) -> None:
    failed = step("publish", State.FAILED, State.FAILED, error="the verdict is fail")
    double.looks = [run(State.RUNNING), run(State.FAILED, *failed, node("root", State.FAILED))]
    result = _submit(double, "--wait")
    assert _told(result) == ["publish: failed, the verdict is fail"]
    assert isinstance(result.exception, UserError)
    message = str(result.exception)
    assert message.startswith(f"the run ended as failed: publish: the verdict is fail; see {double.host}/#/runs/")
    assert "kubectl logs --namespace kubeflow --selector pipeline/runid=run-1 --container main" in message


@pytest.mark.parametrize(
    ("look", "words"),
    [
        (run(State.FAILED, *step("finetune", State.FAILED, State.FAILED)), "failed: finetune-teacher: failed; see"),
        (run(State.FAILED, node("publish-driver", State.FAILED, error="no secret")), "driver of publish: no secret"),
        (run(State.FAILED, error="workflow is too large"), "failed: workflow is too large; see"),
        (run(State.FAILED), "the run ended as failed; see"),
        (run(State.CANCELED), "the run ended as canceled; see"),
    ],
)
def test_a_run_that_ends_badly_with_less_to_say(double: Any, look: Any, words: str) -> None:
    double.looks = [look]
    result = _submit(double, "--wait")
    assert isinstance(result.exception, UserError)
    assert words in str(result.exception)


def test_the_reason_may_be_in_the_history_of_a_task(double: Any) -> None:
    failed = node("publish", State.FAILED)
    failed.state_history = [
        _kfp_double.api.V2beta1RuntimeStatus(state=State.RUNNING),
        _kfp_double.api.V2beta1RuntimeStatus(state=State.FAILED, error=_kfp_double._status("exit code 3")),
    ]
    double.looks = [run(State.FAILED, failed)]
    assert "publish: exit code 3" in str(_submit(double, "--wait").exception)


def test_waiting_outlasts_a_silence_of_the_server(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    double.silent_for = 3
    assert _submit(double, "--wait").exit_code == 0
    double.silent_for = 1000
    monkeypatch.setattr(submit, "MAX_SILENT_POLLS", 2)
    assert isinstance(_submit(double, "--wait").exception, TransientError)


def test_an_interrupt_ends_the_following_and_cancel_ends_the_run(double: Any) -> None:
    double.looks = [run(State.RUNNING, *step("finetune", State.RUNNING, State.RUNNING))]
    command = [sys.executable, "-m", "slmops.cli", *_command(double, "--wait")]
    following = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert following.stdout
    while "running" not in (line := following.stdout.readline()):
        assert line, following.communicate()
    following.send_signal(signal.SIGINT)
    _, errors = following.communicate(timeout=20)

    assert following.returncode == 130
    told = errors.strip().splitlines()[-1]
    assert told.startswith("no longer following; the run goes on. To end it: slmops cancel run-1 --host")
    assert double.terminated == []
    ended = CliRunner().invoke(app, told.partition("slmops ")[2].split())
    assert ended.output == f"asked to end: {double.host}/#/runs/details/run-1\n"
    assert double.terminated == ["run-1"]


def test_cancel_of_a_run_that_is_not_there(double: Any) -> None:
    result = CliRunner().invoke(app, ["cancel", "run-2", "--host", double.host])
    assert isinstance(result.exception, UserError)
    assert "answered 404: Run run-2 not found" in str(result.exception)


def test_the_token_comes_from_a_file_or_the_environment(
    double: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    double.token = "secret"
    (tmp_path / "token").write_text("secret\n")
    assert _submit(double, "--token-file", str(tmp_path / "token")).exit_code == 0
    monkeypatch.setenv(submit.TOKEN, "secret")
    assert _submit(double).exit_code == 0
    assert double.authorizations == {"Bearer secret"}


def test_a_missing_token_is_explained_at_once(double: Any) -> None:
    double.token = "secret"
    started = time.monotonic()
    result = _submit(double)
    assert time.monotonic() - started < 5, "kfp's own client would try again for half a minute"
    assert isinstance(result.exception, UserError)
    assert "--token-file" in str(result.exception)
    assert "secret" not in str(result.exception)
    assert double.runs == []


def test_an_empty_token_file_is_refused(double: Any, tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    assert "is empty" in str(_submit(double, "--token-file", str(tmp_path / "token")).exception)


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (403, UserError, "ask for access to namespace kubeflow"),
        (404, UserError, "is --host the address of Kubeflow Pipelines?"),
        (302, UserError, "is --host the address of Kubeflow Pipelines?"),
        (503, TransientError, "try again later"),
    ],
)
def test_a_refusal_is_explained(double: Any, status: int, kind: type[Exception], words: str) -> None:
    double.refuse_with = status
    result = _submit(double)
    assert isinstance(result.exception, kind)
    assert words in str(result.exception)


def test_a_host_that_does_not_answer_may_be_tried_again(double: Any) -> None:
    double.host = "http://127.0.0.1:9"
    result = _submit(double)
    assert isinstance(result.exception, TransientError)
    assert "http://127.0.0.1:9 does not answer" in str(result.exception)


def test_a_host_needs_a_scheme(double: Any) -> None:
    double.host = "kfp.example.com"
    assert isinstance(_submit(double).exception, ConfigError)


def test_nothing_is_sent_when_a_setting_is_wrong(double: Any) -> None:
    result = _submit(double, "--set", "channel=No_Such")
    assert isinstance(result.exception, ConfigError)
    assert double.authorizations == set()
