"""The training loop: what it does when memory, numbers, signals or the learning rate go wrong, and what it tells."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from slmops import artifacts, torch_models
from slmops.errors import ModelError, TransientError
from slmops.finetune.config import FinetuneConfig
from slmops.finetune.run import run as finetune
from slmops.progress import log
from slmops.records import read_records
from slmops.training import loop
from slmops.training.batches import Batch, Row, encode_rows
from slmops.training.config import TrainingConfig
from slmops.training.generating import make_metric
from slmops.training.head import SparseHead, labels_loss

CPU = torch.device("cpu")


def on_labels(head: SparseHead, batch: Batch) -> torch.Tensor:
    return head.loss(head.hidden(batch), labels_loss(batch))


@pytest.fixture
def make_task(tiny_model: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path) -> Callable[..., loop.Task]:
    """A training of the tiny model with some settings, in a work directory of its own."""
    torch.set_num_threads(1)
    tokenizer = torch_models.load_tokenizer(tiny_model)
    rows = encode_rows(tokenizer, read_records(train_rows), 128)
    held_out = encode_rows(tokenizer, read_records(held_out_rows), 128)

    def make(loss: loop.Loss = on_labels, **settings: object) -> loop.Task:
        work_dir = tmp_path / f"{len(list(tmp_path.iterdir()))}.work"
        work_dir.mkdir()
        config = TrainingConfig.create({"learning_rate": 3e-3, "batch_size": 8, "micro_batch_size": 8} | settings)
        return loop.Task(
            model=torch_models.load_model(tiny_model, dtype=torch.float32, device=CPU),
            loss=loss,
            rows=rows,
            validation_rows=held_out,
            config=config,
            compute_dtype=torch.float32,
            pad_token_id=tokenizer.pad_token_id,
            work_dir=work_dir,
        )

    return make


def room_for(num_rows: int) -> loop.Loss:
    """A device with memory for `num_rows` rows: a double, because no GPU can be asked for, and a CPU kills instead."""

    def loss(head: SparseHead, batch: Batch) -> torch.Tensor:
        if len(batch.rows) > num_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return on_labels(head, batch)

    return loss


def test_out_of_memory_takes_fewer_rows_at_once_and_gives_the_same_training(
    make_task: Callable[..., loop.Task], caplog: pytest.LogCaptureFixture
) -> None:
    expected = loop.train(make_task(num_epochs=0.25), "train")
    found = loop.train(make_task(room_for(2), num_epochs=0.25), "train")
    assert [record.args[1] for record in caplog.records if "memory ran out" in record.msg] == [4, 2]  # type: ignore[index]
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-4)
    assert found.num_tokens == expected.num_tokens


def test_memory_is_given_up_on_after_three_halvings(make_task: Callable[..., loop.Task]) -> None:
    with pytest.raises(
        ModelError, match=r"memory ran out in step 1 with 2 rows .* after halving micro_batch_size 3 times"
    ):
        loop.train(make_task(room_for(0), batch_size=16, micro_batch_size=16), "train")


def test_a_learning_rate_that_diverges_is_named(make_task: Callable[..., loop.Task], tiny_teacher: Path) -> None:
    task = make_task(learning_rate=0.9, max_grad_norm=1e9, num_epochs=5, warmup_fraction=0.5)
    task.model = torch_models.load_model(tiny_teacher, dtype=torch.float32, device=CPU)  # it has something to lose
    with pytest.raises(ModelError, match=r"the loss rose from \S+ to \S+ by step \d+: learning_rate 0.9 diverges"):
        loop.train(task, "train")


def test_a_token_that_the_model_does_not_know_is_named_before_the_first_step(
    make_task: Callable[..., loop.Task],
) -> None:
    task = make_task()
    task.rows = [*task.rows, Row(77, [1, 2, 123_456], [2])]
    with pytest.raises(ModelError, match=r"row 77 has token 123456, but the model knows \d+ tokens only"):
        loop.train(task, "train")


def validation_loss(model: PreTrainedModel, task: loop.Task) -> float:
    """Mean cross-entropy of all held-out rows, by the model's own forward pass."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in task.validation_rows:
            labels = torch.full((1, len(row.input_ids)), -100)
            labels[0, row.targets] = torch.tensor([row.input_ids[at] for at in row.targets])
            total += float(model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss) * len(row.targets)
            count += len(row.targets)
    return total / count


def test_training_stops_when_held_out_rows_get_no_better_and_keeps_the_best_weights(
    make_task: Callable[..., loop.Task],
) -> None:
    settings = {"num_epochs": 30, "num_validations": 120, "max_validation_rows": 40, "learning_rate": 2e-2}
    task = make_task(patience=3, keep_weights="best", **settings)
    curves = loop.train(task, "train")
    assert curves.stopped_early
    assert len(curves.loss) < 30 * len(task.rows) / 8
    assert curves.num_stale_validations == 3
    assert curves.best[1] < curves.validation[-1][1]
    assert validation_loss(task.model.eval(), task) == pytest.approx(curves.best[1], abs=1e-4)


def test_the_tasks_own_metric_rises_with_training(
    make_task: Callable[..., loop.Task], tiny_model: Path, held_out_rows: Path
) -> None:
    task = make_task(num_epochs=4, num_metric_rows=16, max_metric_tokens=12)
    tokenizer = torch_models.load_tokenizer(tiny_model)
    task.metric = make_metric(task.model, tokenizer, read_records(held_out_rows), task.config)
    curves = loop.train(task, "train")
    assert [step for step, _ in curves.metric] == [step for step, _ in curves.validation] == [0, 64, 128]
    assert curves.metric[0][1] == 0.0
    assert curves.metric[-1][1] > 0.4
    assert curves.facts()["metric"] == curves.metric[-1][1]


@pytest.mark.parametrize("setting", ["packing", "activation_checkpointing"])
def test_what_saves_time_or_memory_changes_nothing(make_task: Callable[..., loop.Task], setting: str) -> None:
    expected = loop.train(make_task(num_epochs=0.5), "train")
    found = loop.train(make_task(num_epochs=0.5, **{setting: True}), "train")
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.validation, expected.validation, rtol=0, atol=1e-3)


def test_no_epochs_leave_the_model_as_it_is(make_task: Callable[..., loop.Task]) -> None:
    task = make_task(num_epochs=0)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    curves = loop.train(task, "train")
    assert curves.loss == []
    assert len(curves.validation) == 1
    assert curves.facts()["num_steps"] == 0
    torch.testing.assert_close(dict(task.model.state_dict()), before, rtol=0, atol=0)


def test_tensorboard_and_mlflow_show_the_curves(
    make_task: Callable[..., loop.Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("SLMOPS_TENSORBOARD_DIR", str(tmp_path / "board"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlflow'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    task = make_task(num_epochs=0.25)
    curves = loop.train(task, "train")

    events = EventAccumulator(str(tmp_path / "board" / task.work_dir.name)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [step for step, _ in curves.loss]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([value for _, value in curves.loss])
    assert len(events.Scalars("validation_loss")) == len(curves.validation)
    client = mlflow.MlflowClient(f"file://{tmp_path / 'mlflow'}")
    (found,) = client.search_runs(["0"])
    assert found.info.status == "FINISHED"
    assert found.data.params["batch_size"] == "8"
    assert [point.value for point in client.get_metric_history(found.info.run_id, "loss")] == [
        v for _, v in curves.loss
    ]


def test_an_mlflow_that_does_not_answer_is_named_before_the_first_step(
    make_task: Callable[..., loop.Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(TransientError, match=r"(?s)does not answer at nonsense://nowhere .* unset MLFLOW_TRACKING_URI"):
        loop.train(make_task(), "train")


def start(command: list[str], work: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list(work.glob("*.work/checkpoint.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_sigterm_ends_after_the_step_at_work_and_the_next_run_goes_on(
    tiny_model: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    config = FinetuneConfig(method="full", num_epochs=4, batch_size=8, checkpoint_interval_s=0.2, dtype="float32")
    inputs = {"train": train_rows, "validation": held_out_rows, "base": tiny_model}
    torch.set_num_threads(1)
    whole = finetune(config, **inputs, model=tmp_path / "whole")
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "config.json").write_text(config.model_dump_json())
    options = [f"--{name}={path}" for name, path in inputs.items()]
    command = [sys.executable, "-W", "ignore", "-m", "slmops.finetune", f"--config={stopped / 'config.json'}"]
    process = start([*command, *options, f"--model={stopped / 'model'}"], stopped)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "by SIGTERM; the same command goes on from the checkpoint" in line
    (manifest,) = stopped.glob("*.work/checkpoint.json")
    assert f"stopped after step {json.loads(manifest.read_text())['step']} of {whole.facts['num_steps']}" in line
    resumed = finetune(config, **inputs, model=stopped / "model")
    torch.testing.assert_close(resumed.facts["loss_curve"], whole.facts["loss_curve"], rtol=0, atol=2e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_layers_train_alike(tiny_model: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path) -> None:
    """In a process of its own: torch.compile leaves much behind."""
    config = FinetuneConfig(method="full", num_epochs=0.25, dtype="float32")
    inputs = {"train": train_rows, "validation": held_out_rows, "base": tiny_model}
    expected = finetune(config, **inputs, model=tmp_path / "plain")
    settings = tmp_path / "config.json"
    settings.write_text(config.model_copy(update={"torch_compile": True}).model_dump_json())
    options = [f"--{name}={path}" for name, path in inputs.items()]
    command = [sys.executable, "-W", "ignore", "-m", "slmops.finetune", f"--config={settings}", *options]
    ran = subprocess.run([*command, f"--model={tmp_path / 'compiled'}"], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = artifacts.read(tmp_path / "compiled")
    torch.testing.assert_close(found.facts["loss_curve"], expected.facts["loss_curve"], rtol=0, atol=1e-3)


def test_progress_says_speed_and_memory(make_task: Callable[..., loop.Task], monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr("slmops.progress.LOG_INTERVAL_S", 0.0)
    monkeypatch.setattr("slmops.progress._log_always", notes.append)
    loop.train(make_task(num_epochs=0.25), "distill")
    line: Any = notes[2]
    assert line.startswith("distill: ")
    for part in ("steps", "left", "loss ", "tokens/s", "GB at most"):
        assert part in line
    assert log.name == "slmops"
