"""Adapters are switched at request time over one loaded variant, and each answers as its merged model does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Phi3Config
from typer.testing import CliRunner

from slmops import torch_models
from slmops.cli import app
from slmops.errors import ArtifactError, ModelError
from slmops.inference.batched import BatchedRuntime
from slmops.inference.runtime import open_runtime
from slmops.quantize.adapters import accept_adapters, write_adapter
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import run

IDS = [5, 17, 99, 200, 301, 42, 7, 77]


def make_adapter(model: Path, path: Path, seed: int, **settings: Any) -> NDArray[Any]:
    """A LoRA adapter of random weights, and the logits [8, V] of the model that it is merged into."""
    torch.manual_seed(seed)
    base = torch_models.load_model(model, dtype=torch.float32, device=torch.device("cpu"))
    given: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"} | settings
    with torch_models.quiet_libraries():
        adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **given))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.08)
    adapted.save_pretrained(str(path))
    merged: Any = adapted.merge_and_unload()
    with torch.no_grad():
        logits: NDArray[Any] = merged(input_ids=torch.tensor([IDS])).logits[0].numpy()
    return logits


def logits_of(model: og.Model, adapters: og.Adapters | None, name: str | None) -> NDArray[Any]:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=32, do_sample=False)
    generator = og.Generator(model, parameters)
    if name:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(IDS)
    return np.array(generator.get_output("logits")[0])


def distance(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module")
def accepting(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "variants"
    config = QuantizeConfig(variants=["cpu-int8", "cpu-int4"], accept_adapters=True)
    facts = run(config, model=tiny_model, variants=path).facts["variants"]
    assert all(found["accepts_adapters"] for found in facts.values())
    return path


def test_two_adapters_over_one_base(accepting: Path, tiny_model: Path, tmp_path: Path) -> None:
    wanted = {"first": make_adapter(tiny_model, tmp_path / "first", 1), "second": make_adapter(
        tiny_model, tmp_path / "second", 2, r=8, use_rslora=True
    )}  # fmt: skip
    plain = torch_models.load_model(tiny_model, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        wanted_plain = plain(input_ids=torch.tensor([IDS])).logits[0].numpy()
    model = og.Model(str(accepting / "cpu-int8"))
    adapters = og.Adapters(model)
    for name in wanted:
        file, variant = tmp_path / f"{name}.onnx_adapter", accepting / "cpu-int8"
        done = CliRunner().invoke(app, ["convert-adapter", str(tmp_path / name), str(file), "--variant", str(variant)])
        assert done.output == f"{file}\n"
        adapters.load(str(tmp_path / f"{name}.onnx_adapter"), name)
    for name in ("first", "second", "first"):
        found = logits_of(model, adapters, name)
        assert distance(found, wanted[name]) < 0.03
        others = [logits for other, logits in wanted.items() if other != name]
        assert all(distance(found, other) > 0.3 for other in [*others, wanted_plain])
    assert distance(logits_of(model, adapters, None), wanted_plain) < 0.03


def test_without_an_adapter_the_variant_answers_as_before(accepting: Path, tiny_variants: Path) -> None:
    found, wanted = (logits_of(og.Model(str(path / "cpu-int4")), None, None) for path in (accepting, tiny_variants))
    assert distance(found, wanted) < 1e-5
    served = open_runtime(accepting / "cpu-int4", quantized=True, dtype="auto", num_threads=1)
    assert isinstance(served, BatchedRuntime)
    assert distance(served.logits(IDS), wanted) < 1e-5


def test_fused_projections_and_a_part_of_the_layers(tiny_model: Path, tmp_path: Path) -> None:
    """Phi-3 has one matrix for queries, keys and values; the adapter here changes the MLPs alone."""
    from tests.unit.test_quantize import SIZES, make_model

    config = Phi3Config(**SIZES, vocab_size=1024, original_max_position_embeddings=512, tie_word_embeddings=False)
    model = make_model(tmp_path / "model", config, tiny_model)
    run(
        QuantizeConfig(variants=["cpu-int8"], accept_adapters=True, block_size=16),
        model=model,
        variants=tmp_path / "variants",
    )
    wanted = make_adapter(model, tmp_path / "adapter", 3, target_modules=["down_proj", "qkv_proj"])
    write_adapter(tmp_path / "adapter", tmp_path / "variants" / "cpu-int8", tmp_path / "a.onnx_adapter")
    loaded = og.Model(str(tmp_path / "variants" / "cpu-int8"))
    adapters = og.Adapters(loaded)
    adapters.load(str(tmp_path / "a.onnx_adapter"), "a")
    assert distance(logits_of(loaded, adapters, "a"), wanted) < 0.1
    assert distance(logits_of(loaded, adapters, None), wanted) > 0.2


def test_an_adapter_in_bfloat16_is_switched_as_one_in_float32(
    accepting: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """As PEFT saves it where it was trained in bfloat16."""
    wanted = make_adapter(tiny_model, tmp_path / "adapter", 1)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    write_adapter(tmp_path / "adapter", accepting / "cpu-int8", tmp_path / "a.onnx_adapter")
    model = og.Model(str(accepting / "cpu-int8"))
    adapters = og.Adapters(model)
    adapters.load(str(tmp_path / "a.onnx_adapter"), "a")
    assert distance(logits_of(model, adapters, "a"), wanted) < 0.03


def spoil_config(adapter: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    change(config)
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def spoil_weights(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


B = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda path: (path / "adapter_config.json").write_text("{"), ArtifactError, "is damaged"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"x" * 9), ArtifactError, "is damaged"),
        (lambda path: spoil_config(path, lambda config: config.update(r=0)), ArtifactError, "is damaged .ZeroDivision"),
        (lambda path: spoil_config(path, lambda config: config.pop("r")), ArtifactError, r"damaged \(KeyError\('r'"),
        (
            lambda path: spoil_weights(path, lambda tensors: tensors.pop(B)),
            ArtifactError,
            r"only one of lora_A and lora_B for layers\.1\.mlp\.up_proj",
        ),
        (
            lambda path: spoil_weights(path, lambda tensors: tensors[B].fill_(torch.nan)),
            ModelError,
            r"up_proj\.lora_B\.weight that are not finite",
        ),
    ],
)
def test_a_damaged_adapter_is_one_clear_error_and_leaves_no_file(
    spoil: Callable[[Path], object],
    error: type[Exception],
    said: str,
    accepting: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    make_adapter(tiny_model, tmp_path / "adapter", 1)
    spoil(tmp_path / "adapter")
    with pytest.raises(error, match=said):
        write_adapter(tmp_path / "adapter", accepting / "cpu-int8", tmp_path / "a.onnx_adapter")
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_what_cannot_be_switched_is_said(
    accepting: Path, tiny_variants: Path, tiny_model: Path, tmp_path: Path
) -> None:
    variant = accepting / "cpu-int4"
    make_adapter(tiny_model, tmp_path / "adapter", 1)
    with pytest.raises(ModelError, match="takes adapters already"):
        accept_adapters(variant)
    with pytest.raises(ModelError, match="takes no adapters; build it with accept_adapters=true"):
        write_adapter(tmp_path / "adapter", tiny_variants / "cpu-int4", tmp_path / "a.onnx_adapter")
    with pytest.raises(ArtifactError, match=r"has no adapter_config\.json"):
        write_adapter(tiny_model, variant, tmp_path / "a.onnx_adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "dora")
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ModelError, match="no plain LoRA adapter"):
        write_adapter(tmp_path / "dora", variant, tmp_path / "a.onnx_adapter")
    make_adapter(tiny_model, tmp_path / "half", 1, target_modules=["q_proj"])
    with pytest.raises(
        ModelError, match=r"layers\.0\.attn\.q_proj alone, and the runtime multiplies .*qkv_proj at once"
    ):
        write_adapter(tmp_path / "half", variant, tmp_path / "a.onnx_adapter")
    assert not (tmp_path / "a.onnx_adapter").exists()
