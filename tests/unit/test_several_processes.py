"""Training under a real torchrun, two processes over gloo: what one process would have trained, also after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slmops import artifacts
from slmops.distill.config import DistillConfig
from slmops.distill.run import run as distill
from slmops.errors import ConfigError
from slmops.finetune.config import FinetuneConfig
from slmops.finetune.run import run as finetune
from slmops.training import ranks
from slmops.training.command import read_config
from slmops.training.config import TrainingConfig

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

# What summing in another order changes, at rates where Adam does not blow it up. Rows that were lost, counted twice or
# weighted wrongly part the curves by more than 0.01 within a few steps.
ROUNDING = 1e-3


def command(step: str, config: TrainingConfig, folder: Path, **paths: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config.model_dump_json())
    options = {"config": folder / "config.json", "model": folder / "model"} | paths
    return [*TORCHRUN, "-m", f"slmops.{step}", *(f"--{name}={path}" for name, path in options.items())]


def train_in_two(step: str, config: TrainingConfig, folder: Path, **paths: Path) -> subprocess.CompletedProcess[str]:
    arguments = command(step, config, folder, **paths)
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)


def assert_same_training(ours: Path, expected: Path) -> None:
    facts, other = artifacts.read(ours).facts, artifacts.read(expected).facts
    for name in ("loss_curve", "validation_curve"):
        torch.testing.assert_close(facts[name], other[name], rtol=0, atol=ROUNDING)
    assert facts["num_tokens"] == other["num_tokens"]
    assert (facts["num_processes"], other["num_processes"]) == (2, 1)
    weights, wanted = (load_file(path / "model.safetensors") for path in (ours, expected))
    torch.testing.assert_close(weights, wanted, rtol=0, atol=2e-3)


# 256 rows in batches of 15: the last step of an epoch has one row, so one process has none.
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full", "learning_rate": 1e-3, "num_epochs": 2, "batch_size": 15, "micro_batch_size": 4},
        {"method": "lora", "learning_rate": 5e-3, "batch_size": 15, "weight_decay": 0.01},
        {"method": "full", "learning_rate": 1e-3, "num_epochs": 2, "batch_size": 15, "sharding": "full"},
    ],
    ids=["full", "lora", "shards"],
)
def test_two_processes_fine_tune_as_one(
    settings: dict[str, Any], tiny_model: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    config = FinetuneConfig.create(settings | {"dtype": "float32"})
    inputs = {"train": train_rows, "validation": held_out_rows, "base": tiny_model}
    alone = finetune(config, **inputs, model=tmp_path / "one")
    ran = train_in_two("finetune", config, tmp_path / "two", **inputs)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert_same_training(tmp_path / "two" / "model", tmp_path / "one")
    assert ran.stderr.count(f"{config.method} of 256 rows on cpu") == 1, "only the first process logs"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["config.json", "model"]
    curve = alone.facts["loss_curve"]
    assert curve[-1][1] < curve[0][1] - 0.05, "what is compared is a training that learns"


SUMS = """
import torch
from slmops.training import ranks

ranks.BUCKET_BYTES = 40  # so that the parameters do not fit into one piece
sizes = [(3, 2), (8,), (1,), (4, 4)]
parameters = [torch.nn.Parameter(torch.zeros(size, dtype=torch.float64 if n == 2 else torch.float32))
              for n, size in enumerate(sizes)]
with ranks.joined():
    for number, parameter in enumerate(parameters):
        if ranks.rank() == 0 or number != 1:  # the second process had no rows for one of them
            parameter.grad = torch.full_like(parameter, 10.0 * number + 1 + ranks.rank())
    ranks.sum_gradients(parameters)
    assert [set(p.grad.flatten().tolist()) for p in parameters] == [{3.0}, {11.0}, {43.0}, {63.0}]
    assert [p.grad.shape for p in parameters] == [p.shape for p in parameters]
    assert ranks.sum_numbers([0.5 + ranks.rank(), True], torch.device("cpu")) == [2.0, 2.0]
    assert ranks.agree("same") and not ranks.agree(ranks.rank())
"""


def test_gradients_are_summed_and_not_averaged(tmp_path: Path) -> None:
    """The curves would hardly tell: Adam does not mind the size of a gradient."""
    (tmp_path / "sums.py").write_text(SUMS)
    command = [*TORCHRUN, str(tmp_path / "sums.py")]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.parametrize(
    "settings",
    [{}, {"sharding": "full", "teacher_logits": "online", "hidden_weight": 1.0}],
    ids=["whole", "shards, with projections"],
)
def test_two_processes_distill_as_one(
    settings: dict[str, Any], tiny_teacher: Path, tiny_responses: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    config = DistillConfig.create(
        {"learning_rate": 2e-3, "temperature": 2.0, "keep_layers": [0, 3], "dtype": "float32"} | settings
    )
    inputs = {
        "responses": tiny_responses,
        "validation": held_out_rows,
        "teacher": tiny_teacher,
        "student": tiny_teacher,
    }
    distill(config, **inputs, model=tmp_path / "one")
    ran = train_in_two("distill", config, tmp_path / "two", **inputs)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert_same_training(tmp_path / "two" / "model", tmp_path / "one")


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_killed_process_ends_the_others_and_the_next_run_goes_on_to_the_same_curve(
    sharding: str, tiny_model: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    settings = {"method": "full", "learning_rate": 1e-3, "num_epochs": 3, "checkpoint_interval_s": 0.01}
    config = FinetuneConfig.create(settings | {"dtype": "float32", "sharding": sharding})
    inputs = {"train": train_rows, "validation": held_out_rows, "base": tiny_model}
    finetune(config, **inputs, model=tmp_path / "one")

    folder = tmp_path / "two"
    arguments = command("finetune", config, folder, **inputs)
    with subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as torchrun:
        deadline = time.monotonic() + 120
        while not list(folder.glob("*.work/checkpoint.json")) and time.monotonic() < deadline:
            assert torchrun.poll() is None
            time.sleep(0.02)
        os.kill(second_process(torchrun.pid), signal.SIGKILL)
        _, errors = torchrun.communicate(timeout=60)
    assert torchrun.returncode == 1, "the training ends when one process does"
    assert "Signal 9 (SIGKILL)" in errors
    assert not (folder / "model").exists(), "a killed run leaves nothing that looks complete"

    resumed = train_in_two("finetune", config, folder, **inputs)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stderr.count("going on after step") == 1
    assert_same_training(folder / "model", tmp_path / "one")


def second_process(torchrun: int) -> int:
    """The process id of rank 1 below torchrun."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("torchrun has no process of rank 1")


def test_a_loss_that_is_not_finite_ends_all_processes_in_that_step_and_says_why(
    tiny_model: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    # One row a step: the process that has none has a finite loss, and must stop as well.
    config = FinetuneConfig(method="full", batch_size=1, dtype="float32")
    inputs = {"train": train_rows, "validation": held_out_rows, "base": broken}
    ran = train_in_two("finetune", config, tmp_path / "two", **inputs)
    assert ran.returncode == 1
    assert ran.stderr.count("error: finetune: the loss of step 1 is nan") == 2, ran.stderr[-3000:]
    assert not (tmp_path / "two" / "model").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"method": "lora", "batch_size": 0, "epochs": 2}', r"(?s)batch_size: .* got 0.*epochs: extra inputs"),
        ("method: lora", "is not JSON"),
        ("[]", "must hold a JSON object of settings, got list"),
    ],
)
def test_a_config_that_does_not_fit_is_explained(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        read_config(FinetuneConfig, tmp_path / "config.json")


@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 16])
def test_every_row_of_a_step_is_computed_once(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(ranks.share(range(num_rows)))
    assert sorted(row for share in shares for row in share) == list(range(num_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(map(sum, shares)) - min(map(sum, shares)) <= max(num_rows, 0), "rows sorted by length weigh alike"


def test_dropout_differs_between_processes_and_repeats_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[tuple[int, int], int] = {}
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        seeds |= {(rank, step): ranks.seed(0, step) for step in range(4)}
    assert len(set(seeds.values())) == 16
    assert ranks.seed(0, 3) == seeds[3, 3]
