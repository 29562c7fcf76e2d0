"""Drift layer by layer: nothing moves where nothing was rounded, and what moved is found at its own layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import (
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from slmops import torch_models
from slmops.evaluate import layer_drift
from slmops.evaluate.config import EvaluateConfig
from slmops.evaluate.drift import EncodedRow
from slmops.evaluate.run import run
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.olive_workflow import run_passes
from slmops.quantize.run import run as quantize
from slmops.variants import ModelFiles, find_model
from tests.unit.test_quantize import SIZES, make_model

ROWS = [([1, 40, 50, 60, 70, 80, 2], 4), ([1, 45, 2], 2)]
"""Tokens with the length of the prompt; random models see no sense in them."""

KINDS: dict[str, PreTrainedConfig] = {
    "tied": LlamaConfig(**SIZES, vocab_size=1027, tie_word_embeddings=True),
    "norms of queries and keys": Qwen3Config(**SIZES, vocab_size=1024, head_dim=32, tie_word_embeddings=True),
    "fused projections": Phi3Config(**SIZES, vocab_size=1024, original_max_position_embeddings=512),
    "scaled embedding and sums": GraniteConfig(
        **SIZES, vocab_size=1024, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=2.0
    ),
}


def load(model: Path) -> PreTrainedModel:
    return torch_models.load_model(model, dtype=torch.float32, device=torch.device("cpu"))


def not_rounded(model: Path, directory: Path) -> ModelFiles:
    """A variant in float32, which is for this test: a real graph of the real builder that has not moved at all."""
    settings = {"precision": "fp32", "execution_provider": "cpu"}
    run_passes(model, {"GenAIModelBuilder": settings}, directory, "not rounded")
    sidecar: Any = None
    return ModelFiles(directory, "cpu-fp32", True, "", 0, sidecar)


def found(files: ModelFiles, reference: PreTrainedModel) -> dict[str, float]:
    facts = layer_drift.measure(files, reference, ROWS, num_threads=1)
    assert (facts["num_rows"], facts["num_positions"]) == (2, 4)
    return {part["part"]: part["kl_mean"] for part in facts["parts"]}


@pytest.fixture(scope="module")
def variants(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layer-drift") / "variants"
    quantize(QuantizeConfig(variants=["cpu-int4", "cpu-int8"]), model=tiny_teacher, variants=path)
    return path


def test_layers_may_take_several_passes(variants: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, reference = find_model(variants, "cpu-int4"), load(tiny_teacher)
    at_once = found(files, reference)
    monkeypatch.setattr(layer_drift, "MAX_TOKENS", 16)
    assert found(files, reference) == pytest.approx(at_once, rel=1e-3)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_drift_begins_with_the_layer_that_moved(config: PreTrainedConfig, tiny_model: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", config, tiny_model)
    files, reference = not_rounded(model, tmp_path / "variant"), load(model)
    still = found(files, reference)
    assert list(still) == ["embedding", "layer 0", "layer 1", "head"]
    assert max(still.values()) < 1e-6
    with torch.no_grad():
        reference.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(1.5)
    moved = found(files, reference)
    assert max(moved["embedding"], moved["layer 0"]) < 1e-6
    assert min(moved["layer 1"], moved["head"]) > 1e-3
    assert moved["layer 1"] == pytest.approx(moved["head"], rel=1e-3)


def test_the_last_part_is_the_drift_of_the_whole(
    variants: Path, tiny_teacher: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    whole = {}
    for variant in ("cpu-int4", "cpu-int8"):
        config = EvaluateConfig(
            variant=variant, max_rows=6, max_new_tokens=8, drift_rows=6, layer_drift_rows=6, num_injections=0
        )
        sidecar = run(config, model=variants, test=held_out_rows, evaluation=tmp_path / variant, reference=tiny_teacher)
        drift = sidecar.facts["drift"]
        parts = {part["part"]: part["kl_mean"] for part in drift["layers"]["parts"]}
        assert (drift["layers"]["num_rows"], drift["layers"]["num_positions"]) == (6, drift["answer_positions"])
        assert parts["head"] == pytest.approx(drift["answer_kl_mean"], rel=1e-3)
        assert all(kl >= 0 for kl in parts.values())
        whole[variant] = parts
    assert len(whole["cpu-int4"]) == load(tiny_teacher).config.num_hidden_layers + 2
    assert all(whole["cpu-int8"][part] < kl for part, kl in whole["cpu-int4"].items() if part.startswith("layer"))


def test_layers_are_measured_where_asked_only(
    variants: Path, tiny_teacher: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    config = EvaluateConfig(variant="cpu-int8", max_rows=2, max_new_tokens=4, num_injections=0)
    sidecar = run(config, model=variants, test=held_out_rows, evaluation=tmp_path / "out", reference=tiny_teacher)
    assert "answer_kl_mean" in sidecar.facts["drift"]
    assert "layers" not in sidecar.facts["drift"]


def test_what_is_no_variant_for_onnx_runtime_says_so(tiny_teacher: Path, held_out_rows: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(max_rows=2, max_new_tokens=4, layer_drift_rows=2, num_injections=0)
    sidecar = run(config, model=tiny_teacher, test=held_out_rows, evaluation=tmp_path / "out", reference=tiny_teacher)
    assert sidecar.facts["drift"]["layers"] == {"not_run": "only variants for ONNX Runtime show their layers"}


def edited(variants: Path, directory: Path, edit: Callable[[onnx.ModelProto, dict[str, Any]], None]) -> ModelFiles:
    """cpu-int8 with another graph or another genai_config.json; its weights stay where they are."""
    directory.mkdir()
    source = variants / "cpu-int8"
    model, settings = onnx.load(str(source / "model.onnx")), json.loads((source / "genai_config.json").read_text())
    edit(model, settings)
    onnx.save(model, str(directory / "model.onnx"))
    (directory / "genai_config.json").write_text(json.dumps(settings))
    return replace(find_model(variants, "cpu-int8"), directory=directory)


def rename_norms(model: onnx.ModelProto, _: dict[str, Any]) -> None:
    for node in model.graph.node:
        node.input[:] = [name.replace("input_layernorm.weight", "norm.weight") for name in node.input]
    for weight in model.graph.initializer:
        weight.name = weight.name.replace("input_layernorm.weight", "norm.weight")


def give_a_window(_: onnx.ModelProto, settings: dict[str, Any]) -> None:
    settings["model"]["decoder"]["sliding_window"] = {"window_size": 16}


@pytest.mark.parametrize(
    ("edit", "said"),
    [(rename_norms, "there is no model.layers.0.input_layernorm.weight"), (give_a_window, "attends to a window")],
)
def test_a_graph_of_another_form_says_why(
    edit: Callable[[onnx.ModelProto, dict[str, Any]], None],
    said: str,
    variants: Path,
    tiny_teacher: Path,
    tmp_path: Path,
) -> None:
    files = edited(variants, tmp_path / "edited", edit)
    assert said in layer_drift.measure(files, load(tiny_teacher), ROWS, 1)["not_run"]


def test_what_shows_no_layers_says_why(variants: Path, tiny_teacher: Path, tiny_model: Path, tmp_path: Path) -> None:
    small, reference = find_model(variants, "cpu-int8"), load(tiny_teacher)

    def why(files: ModelFiles, model: PreTrainedModel, rows: Sequence[EncodedRow] = ROWS) -> str:
        return str(layer_drift.measure(files, model, rows, 1)["not_run"])

    assert "no CUDAExecutionProvider" in why(replace(small, execution_provider="cuda"), reference)
    assert "no row" in why(small, reference, [])
    gpt2 = GPT2Config(vocab_size=1027, n_embd=32, n_layer=1, n_head=2)
    assert "list that is known here" in why(small, load(make_model(tmp_path / "gpt2", gpt2, tiny_model)))
    deep = KINDS["tied"]
    assert "layers, and its reference 2" in why(small, load(make_model(tmp_path / "other", deep, tiny_model)))


def test_keys_and_values_of_an_unknown_type_are_said(
    variants: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_drift, "FLOATS", {})
    facts = layer_drift.measure(find_model(variants, "cpu-int8"), load(tiny_teacher), ROWS, 1)
    assert facts == {"not_run": "its keys and values are kept as tensor(float)"}


def test_predictions_that_are_no_numbers_are_no_drift(variants: Path, tiny_teacher: Path) -> None:
    reference = load(tiny_teacher)
    with torch.no_grad():
        reference.get_parameter("model.norm.weight")[0] = math.nan
    facts = layer_drift.measure(find_model(variants, "cpu-int8"), reference, ROWS, 1)
    assert "no number" in facts["not_run"]
    assert "parts" not in facts
