"""`slmops submit`, against a double of the Kubeflow Pipelines API (kfp_double.py), which is no Kubeflow."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from slmops.cli import app
from slmops.errors import ConfigError, TransientError, UserError
from slmops.kubeflow import submit

_SPEC = importlib.util.spec_from_file_location("kfp_double", Path(__file__).parent / "kfp_double.py")
assert _SPEC
assert _SPEC.loader
_kfp_double = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_kfp_double)

SETTINGS = (
    "--set",
    "data_uri=s3://b/rows.csv",
    "--set",
    "base_model_uri=s3://b/base",
    "--set",
    "store_uri=s3://b/edge",
)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("HOME", str(tmp_path))  # kfp's client keeps a context below it
    monkeypatch.delenv(submit.TOKEN, raising=False)
    monkeypatch.setattr(submit, "POLL_S", 0.01)
    with _kfp_double.kfp_double() as served:
        yield served


def _submit(double: Any, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["submit", "distill_to_edge", "--host", double.host, *SETTINGS, *arguments])


def test_a_run_is_created_with_its_parameters(double: Any) -> None:
    result = _submit(double, "--namespace", "ml", "--experiment", "first", "--run-name", "mine", "--recipe", "demo")

    assert result.exit_code == 0, result.exception
    assert result.output == f"run: {double.host}/#/runs/details/run-1\n"
    (run,) = double.runs
    assert run["display_name"] == "mine"
    assert run["experiment_id"] == "experiment-1"
    assert run["runtime_config"]["parameters"] == {
        "data_uri": "s3://b/rows.csv",
        "base_model_uri": "s3://b/base",
        "store_uri": "s3://b/edge",
    }
    assert run["pipeline_spec"]["pipelineInfo"]["name"] == "distill-to-edge"
    (experiment,) = double.experiments
    assert (experiment["display_name"], experiment["namespace"]) == ("first", "ml")


def test_wait_follows_the_run_to_its_end(double: Any) -> None:
    result = _submit(double, "--wait")
    assert result.exit_code == 0, result.exception
    assert result.output.splitlines()[1:] == ["publish: pending", "publish: running", "publish: succeeded", "succeeded"]


def test_wait_tells_why_a_run_failed(double: Any) -> None:
    double.states = ["RUNNING", "FAILED"]
    result = _submit(double, "--wait")
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == (
        f"the run ended as failed: publish: the verdict is fail; see {double.host}/#/runs/details/run-1"
    )


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
