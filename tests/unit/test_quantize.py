"""quantize: what Olive writes runs, is small, is the same each time; what it cannot build is one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from slmops import artifacts
from slmops.errors import ModelError
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import check_runs, run


def test_variants_hold_what_the_runtime_needs_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    sidecar = run(QuantizeConfig(variants=["cpu-int4", "cpu-int8"]), model=tiny_model, variants=tmp_path / "variants")
    names = {entry.path.split("/")[1] for entry in sidecar.files}
    assert names == {
        "chat_template.jinja", "genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    sizes = {name: variant["size_bytes"] for name, variant in sidecar.facts["variants"].items()}
    assert sizes["cpu-int4"] < sizes["cpu-int8"] < (tiny_model / "model.safetensors").stat().st_size
    assert not list((tmp_path / "variants").glob(".*")), "nothing of Olive's is left behind"


def test_the_same_model_gives_the_same_digest(tiny_model: Path, tiny_variants: Path, tmp_path: Path) -> None:
    again = run(QuantizeConfig(), model=tiny_model, variants=tmp_path / "variants")
    assert again.facts == artifacts.read(tiny_variants).facts


def test_an_architecture_that_the_exporter_does_not_know_is_named(tiny_model: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="the exporter does not know the architecture GPT2LMHeadModel"):
        run(QuantizeConfig(), model=tmp_path / "gpt2", variants=tmp_path / "variants")
    assert not (tmp_path / "variants").exists()


def test_a_variant_that_does_not_load_does_not_count(tiny_variants: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (tiny_variants / "cpu-int4").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    settings = json.loads((broken / "genai_config.json").read_text())
    settings["model"]["decoder"]["filename"] = "absent.onnx"
    (broken / "genai_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"cannot be loaded by onnxruntime-genai .*absent\.onnx"):
        check_runs(broken)
