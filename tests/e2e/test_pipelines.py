"""Whole pipelines on a tiny model through the command, into a local store: other data by `--set` alone, and errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmops import artifacts
from slmops.demo import building_commands
from slmops.edge.pull import pull
from slmops.edge.serve import MODEL_ID
from slmops.publish.config import PublishConfig
from slmops.publish.run import run as publish
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import run as quantize
from slmops.records import write_jsonl
from tests.datasets import commands
from tests.judged import write_verdict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BANKING77 = Path(__file__).parents[3] / "shared" / "data" / "banking77" / "train.csv"


def slmops_run(pipeline: str, output_dir: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """`slmops run`, with settings whose double underscore stands for a dot."""
    arguments = [f"--set={name.replace('__', '.')}={value}" for name, value in settings.items()]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "slmops.cli",
            "run",
            pipeline,
            "--recipe=smoke",
            f"--output-dir={output_dir}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
    )


def test_banking77_runs_through_the_same_pipeline_by_settings_alone(tiny_model: Path, tmp_path: Path) -> None:
    if not BANKING77.is_file():
        pytest.skip(f"the banking77 data set is not at {BANKING77}")
    done = slmops_run(
        "distill_to_edge",
        tmp_path / "run",
        data_uri=BANKING77,
        base_model_uri=tiny_model,
        store_uri=tmp_path / "store",
        prompt_template="{text}",
        completion_template="{category}",
        prepare_data__split_by="seed",
        prepare_data__stratify_by="category",
        labels__given="few",
        evidence__wanted="true",
        finetune__num_epochs=4,
        evaluate__match="exact",
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["tasks"]["gate"]["status"] == "succeeded", done.stderr[-2000:]
    # A tiny model may learn none of 77 intents in seconds; then the gate has nothing to compare and publishes nothing.
    assert (done.returncode, (tmp_path / "store/v1/metadata").exists()) in {(0, True), (3, False)}
    rows = Path(record["tasks"]["prepare-data"]["outputs"]["train"]) / "rows.jsonl"
    assert len(rows.read_text().splitlines()) > 8000
    labelled = artifacts.read(Path(record["tasks"]["withhold-labels"]["outputs"]["labelled"]))
    assert (labelled.facts["num_rows"], labelled.facts["num_classes"]) == (770, 77)
    comparison = artifacts.read(Path(record["tasks"]["compare"]["outputs"]["comparison"]))
    assert {"teacher_accuracy", "untrained_accuracy", "labels_only_accuracy", "distilled_accuracy"} <= set(
        comparison.facts
    )
    assert comparison.facts["num_rows"] == 64
    assert "<svg" in Path(record["tasks"]["compare"]["outputs"]["report"]).read_text()


def test_finetune_to_edge_publishes_a_fine_tuned_model(tiny_model: Path, tmp_path: Path) -> None:
    rows = building_commands.write(tmp_path / "rows.jsonl", num_rows=1500)
    done = slmops_run(
        "finetune_to_edge",
        tmp_path / "run",
        data_uri=rows,
        base_model_uri=tiny_model,
        store_uri=tmp_path / "store",
        prompt_template="{request}",
        completion_template="{command}",
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (tmp_path / "store" / "v1" / "metadata" / "timestamp.json").is_file()


@pytest.fixture
def served_teacher(tiny_teacher: Path, tmp_path: Path) -> Iterator[str]:
    """The address of an edge server that answers with the tiny teacher, quantized."""
    variants = tmp_path / "teacher" / "variants"
    verdict = write_verdict(
        tmp_path / "teacher" / "verdict", quantize(QuantizeConfig(), model=tiny_teacher, variants=variants)
    )
    store, node = str(tmp_path / "teacher" / "store"), tmp_path / "teacher" / "node"
    publish(PublishConfig(store_uri=store), variants=variants, verdict=verdict, release=tmp_path / "release")
    pull(store, "default", node)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "slmops.cli", "edge", "serve", f"--root={node}", f"--port={port}"]
    with subprocess.Popen([*command, "--max-queue=64"]) as server:
        yield f"http://127.0.0.1:{port}/v1"
        server.terminate()


def test_a_teacher_behind_an_endpoint_teaches(tiny_model: Path, served_teacher: str, tmp_path: Path) -> None:
    """Its answers come in three shards, and are merged."""
    rows = [
        {"request": r.messages[0].content, "command": r.completion, "kind": r.stratum} for r in commands(200, seed=3)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    done = slmops_run(
        "endpoint_to_edge",
        tmp_path / "run",
        data_uri=tmp_path / "rows.jsonl",
        base_model_uri=tiny_model,
        endpoint_url=served_teacher,
        store_uri=tmp_path / "store",
        prompt_template="{request}",
        completion_template="{command}",
        prepare_data__split_by="seed",
        generate_responses__endpoint_model=MODEL_ID,
        generate_responses__max_rows=256,
        generate_responses__num_shards=3,
        finetune__num_epochs=4,
        evaluate__match="exact",
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    responses = artifacts.read(Path(record["tasks"]["merge-responses"]["outputs"]["responses"]))
    assert responses.facts["teacher"] == MODEL_ID
    assert responses.facts["num_rows"] > 100, responses.facts
    assert (tmp_path / "store" / "v1" / "metadata" / "timestamp.json").is_file()


def test_a_step_that_fails_ends_the_run_with_its_reason_and_code(tiny_model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    done = slmops_run(
        "distill_to_edge",
        tmp_path / "run",
        data_uri=empty,
        base_model_uri=tiny_model,
        store_uri=tmp_path / "store",
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        f"error: preflight: data: {empty} is empty; check that it is the right file"
    )
    assert not (tmp_path / "store/v1/metadata").exists()
