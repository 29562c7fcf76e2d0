"""Data that changes behind the same URI is noticed: preflight finds its version, and KFP's cache sees it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from kfp import dsl
from kfp.compiler import Compiler

from slmops.demo.object_store import ObjectStore
from slmops.kubeflow.components import component_folders

pytestmark = pytest.mark.slow

COMPONENTS = {folder.step: folder.load() for folder in component_folders()}


@dsl.pipeline(name="check-and-prepare")
def check_and_prepare(data_uri: str, base_model_uri: str, store_uri: str) -> None:
    """The first two steps of every pipeline."""
    checked = COMPONENTS["preflight"](data_uri=data_uri, base_model_uri=base_model_uri, store_uri=store_uri)
    checked.set_caching_options(False)
    COMPONENTS["prepare_data"](source_uri=data_uri, source_version=checked.outputs["data_version"])


def statuses(folder: Path, environment: Mapping[str, str], **settings: object) -> list[str]:
    """How preflight and prepare-data went in one run."""
    command = [sys.executable, "-m", "slmops.cli", "run", str(folder / "pipeline.yaml")]
    command += ["--output-dir", str(folder / "run"), *(f"--set={name}={value}" for name, value in settings.items())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-2000:]
    tasks = json.loads((folder / "run" / "run.json").read_text())["tasks"]
    return [tasks[name]["status"] for name in ("preflight", "prepare-data")]


def rows(word: str) -> bytes:
    return "".join(json.dumps({"prompt": f"{word} {n}", "completion": "yes"}) + "\n" for n in range(100)).encode()


def test_rows_that_change_behind_s3_are_prepared_again(s3: ObjectStore, tiny_model: Path, tmp_path: Path) -> None:
    Compiler().compile(check_and_prepare, str(tmp_path / "pipeline.yaml"))
    environment, bucket = s3.environment(), s3.make_bucket()
    uris = {"data_uri": f"{bucket}/rows.jsonl", "base_model_uri": tiny_model, "store_uri": f"{bucket}/releases"}
    put = s3.client().put_object

    put(Bucket=bucket.removeprefix("s3://"), Key="rows.jsonl", Body=rows("one"))
    assert statuses(tmp_path, environment, **uris) == ["succeeded", "succeeded"]
    assert statuses(tmp_path, environment, **uris) == ["succeeded", "cached"], "preflight speaks of now"
    put(Bucket=bucket.removeprefix("s3://"), Key="rows.jsonl", Body=rows("two"))
    assert statuses(tmp_path, environment, **uris) == ["succeeded", "succeeded"]
