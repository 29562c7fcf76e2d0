"""finetune on a real, tiny model: it learns, its methods agree, and a killed run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slmops import artifacts
from slmops.errors import ArtifactError, ModelError
from slmops.finetune.config import FinetuneConfig
from slmops.finetune.run import _add_adapters, _load_base, run
from slmops.training.head import SparseHead


def quick(**settings: object) -> FinetuneConfig:
    defaults = {"learning_rate": 3e-3, "num_epochs": 1, "dtype": "float32"}
    return FinetuneConfig.create(defaults | settings)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_each_method_learns_and_writes_a_whole_model(
    method: str, tiny_model: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    rate = 3e-3 if method == "full" else 2e-2
    sidecar = run(
        quick(method=method, learning_rate=rate),
        train=train_rows,
        validation=held_out_rows,
        base=tiny_model,
        model=tmp_path / "model",
    )
    before, after = sidecar.facts["validation_curve"][0][1], sidecar.facts["validation_loss"]
    assert after < before - 0.5
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == load_file(tiny_model / "model.safetensors").keys(), (
        "adapters are merged, nothing is in 4 bits"
    )
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert artifacts.read(tmp_path / "model").facts["method"] == method
    assert list(tmp_path.iterdir()) == [tmp_path / "model"], "no unfinished work is left behind"


def test_gradients_through_a_4_bit_base_are_those_of_the_same_weights_in_full_precision(tiny_model: Path) -> None:
    """bitsandbytes' packing for inference would cut them off without an error; a first evaluation must not start it."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    cpu = torch.device("cpu")
    config = quick(method="qlora", lora_rank=4)
    packed = _load_base(tiny_model, config, torch.float32, cpu)
    plain = _load_base(tiny_model, quick(method="lora"), torch.float32, cpu)
    for name, module in packed.named_modules():
        if isinstance(module, bnb.nn.modules.Linear4bit):
            weight: Any = module.weight
            weights = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            plain.get_submodule(name).weight.data = weights.to(torch.float32)
    gradients = []
    for model in (packed, plain):
        adapted = _add_adapters(model, config)
        generator = torch.Generator().manual_seed(1)
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        SparseHead(model.eval())
        model.train()
        ids = torch.arange(20).unsqueeze(0)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=2e-2, atol=2e-4)


WORKER = """
import json, sys
from pathlib import Path
from slmops.finetune.config import FinetuneConfig
from slmops.finetune.run import run
from slmops.progress import set_up_logging
set_up_logging()
paths = {name: Path(path) for name, path in json.loads(sys.argv[1]).items()}
run(FinetuneConfig.create(json.loads(sys.argv[2])), **paths)
"""


def test_a_killed_run_goes_on_to_the_same_weights(
    tiny_model: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    config = quick(method="lora", lora_dropout=0.1, num_epochs=2, checkpoint_interval_s=0.05, batch_size=8)
    inputs = {"train": train_rows, "validation": held_out_rows, "base": tiny_model}
    torch.set_num_threads(1)
    whole = run(config, **inputs, model=tmp_path / "whole")
    assert whole.facts["num_steps"] == 64

    killed = tmp_path / "killed"
    paths = {name: str(path) for name, path in inputs.items()} | {"model": str(killed / "model")}
    killed.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", WORKER, json.dumps(paths), config.model_dump_json()]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list(killed.glob("*.work/checkpoint.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model").exists(), "a killed run leaves nothing that looks complete"
    with pytest.raises(ArtifactError):
        artifacts.read(killed / "model")

    resumed = run(config, **inputs, model=killed / "model")
    # Dropout and the order of rows would part the curves by far more, if their random states were lost; what is left
    # is the rounding of matrix products, which depends on where memory lies.
    torch.testing.assert_close(resumed.facts["loss_curve"], whole.facts["loss_curve"], rtol=0, atol=2e-4)
    weights, expected = (load_file(path / "model.safetensors") for path in (killed / "model", tmp_path / "whole"))
    torch.testing.assert_close(weights, expected, rtol=0, atol=2e-3)
    assert [path.name for path in killed.iterdir()] == ["model"]


def test_a_loss_that_is_not_finite_names_the_rows_of_its_batch(
    tiny_model: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    config = quick(method="full", learning_rate=0.99, max_grad_norm=1e30, num_epochs=20, warmup_fraction=0)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"rows of its batch are \[\d+"):
        run(config, train=train_rows, validation=held_out_rows, base=broken, model=tmp_path / "model")
    assert not (tmp_path / "model").exists()
