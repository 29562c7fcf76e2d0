"""quantize: what it writes runs, is small, is near the model, is the same each time; what cannot be built is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    SmolLM3Config,
)

from slmops import artifacts, torch_models
from slmops.errors import ConfigError, DataError, ModelError
from slmops.inference.batched import BatchedRuntime
from slmops.inference.genai import GenAIRuntime
from slmops.inference.runtime import open_runtime
from slmops.inference.slots import LOGITS_FROM
from slmops.quantize import run as quantize_step
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.job import Job
from slmops.quantize.run import check_runs, run
from slmops.quantize.variants import GENAI, REFUSED, VARIANTS
from slmops.records import ChatRecord
from slmops.training.batches import encode
from tests.datasets import commands, write_dataset

BUDGET = 0.05

DEVICE_CLASS = {
    "architecture": "x86_64", "instruction_sets": ["AVX2"], "execution_provider": "cpu", "num_cpus": 2,
    "ram_mib": 1024, "disk_mib": 2048, "context_length": 256, "time_to_first_token_ms_p95": 500,
    "latency_ms_p95": 2000, "tokens_per_s": 10, "min_accuracy_kept": 0.9,
}  # fmt: skip

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "dtype": "float32",
}  # fmt: skip

NAMES = [name for name, variant in VARIANTS.items() if variant.backend == GENAI]
"""All variants of the first backend; the second one's have tests of their own."""


def make_model(path: Path, config: PreTrainedConfig, tokenizer_of: Path) -> Path:
    """A model whose random weights are large enough for its answers to depend on what it reads."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            else:
                parameter.normal_(0, 0.15)
    torch_models.save_model(model, AutoTokenizer.from_pretrained(tokenizer_of), path)
    return path


def bits_of_nodes(directory: Path) -> dict[str, int]:
    """Bits of the weights of each matrix product in a variant's graph, by the node's name."""
    graph = onnx.load(str(directory / "model.onnx"), load_external_data=False).graph
    return {n.name: onnx.helper.get_node_attr_value(n, "bits") for n in graph.node if n.op_type == "MatMulNBits"}


def facts_of(config: QuantizeConfig, model: Path, variants: Path, calibration: Path | None = None) -> dict[str, Any]:
    found: dict[str, Any] = run(config, model=model, variants=variants, calibration=calibration).facts["variants"]
    return found


@pytest.fixture(scope="module")
def wild_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that rounding harms, with a tied embedding and a vocabulary of no whole blocks."""
    config = LlamaConfig(**SIZES, vocab_size=1027, tie_word_embeddings=True)
    return make_model(tmp_path_factory.mktemp("models") / "wild", config, tiny_model)


@pytest.fixture(scope="module")
def all_variants(wild_model: Path, train_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model in every variant."""
    path = tmp_path_factory.mktemp("quantized") / "all"
    config = QuantizeConfig(variants=NAMES, drift_budget=BUDGET)
    run(config, model=wild_model, variants=path, calibration=train_rows)
    return path


def test_variants_hold_what_the_runtime_needs_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    sidecar = run(QuantizeConfig(variants=["cpu-int4", "cpu-int8"]), model=tiny_model, variants=tmp_path / "variants")
    names = {entry.path.split("/")[1] for entry in sidecar.files}
    assert names == {
        "chat_template.jinja", "genai_config.json", "inference_model.json", "model.onnx", "model.onnx.data",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    sizes = {name: variant["size_bytes"] for name, variant in sidecar.facts["variants"].items()}
    assert sizes["cpu-int4"] < sizes["cpu-int8"] < (tiny_model / "model.safetensors").stat().st_size
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["variants"], "nothing of Olive's is left behind"


def test_the_same_model_gives_the_same_digest(tiny_model: Path, tiny_variants: Path, tmp_path: Path) -> None:
    again = run(QuantizeConfig(), model=tiny_model, variants=tmp_path / "variants")
    assert again.facts == artifacts.read(tiny_variants).facts


def test_calibrated_variants_are_nearer_than_plain_rounding_in_the_same_size(all_variants: Path) -> None:
    facts = artifacts.read(all_variants).facts["variants"]
    plain = facts["cpu-int4"]
    assert facts["cpu-int4-gptq"]["drift_kl"] < 0.8 * plain["drift_kl"]
    assert facts["cpu-int4-awq"]["drift_kl"] < plain["drift_kl"]
    for name in ("cpu-int4-gptq", "cpu-int4-awq"):
        assert facts[name]["size_bytes"] < 1.05 * plain["size_bytes"], "the tied embedding is stored once, in 4 bits"
    assert facts["cpu-int8"]["drift_kl"] < facts["cpu-int4-gptq"]["drift_kl"]
    assert facts["cpu-int8"]["size_bytes"] < 2.1 * plain["size_bytes"], "the embedding is in 8 bits too"


def test_facts_say_how_each_was_made_and_whether_it_ran(all_variants: Path) -> None:
    facts = artifacts.read(all_variants).facts["variants"]
    assert list(facts) == NAMES
    for name, found in facts.items():
        files = list(artifacts.list_files(all_variants / name))
        assert found["digest"] == artifacts.digest_of(files)
        assert found["backend"] == "onnxruntime-genai"
        assert name.startswith(found["execution_provider"] + "-" + found["precision"])
        if found["execution_provider"] == "cpu":
            assert found["ran"] is True
        elif not found["ran"]:
            assert "no GPU" in found["not_run"]
            assert "drift_kl" not in found


def test_mixed_keeps_its_budget_by_more_bits_where_they_matter(all_variants: Path) -> None:
    facts = artifacts.read(all_variants).facts["variants"]["cpu-int4-mixed"]
    assert facts["estimated_drift_kl"] <= BUDGET < facts["estimated_drift_kl_all_int4"]
    assert facts["drift_kl"] <= BUDGET
    assert facts["drift_kl"] == pytest.approx(facts["estimated_drift_kl"], rel=0.3), "activations are rounded as well"
    nodes = bits_of_nodes(all_variants / "cpu-int4-mixed")
    kept = {name for name, bits in nodes.items() if bits == 8}
    assert 0 < len(kept) < len(nodes)
    wanted = {re.sub(r"[qkv]_proj", "qkv_proj", name.replace("self_attn", "attn")) for name in facts["kept_in_int8"]}
    assert {name.strip("/").replace("/", ".") for name in kept} == {f"{name}.MatMulNBits" for name in wanted}


def test_the_largest_block_within_the_budget_is_taken(wild_model: Path, train_rows: Path, tmp_path: Path) -> None:
    """In blocks of 16 it drifts least: a budget that only they keep takes them, a wide one takes the largest."""
    chosen = {}
    for budget in (1e-7, 10.0):
        config = QuantizeConfig(block_sizes=[16, 64, 128], drift_budget=budget)
        facts = facts_of(config, wild_model, tmp_path / str(budget), train_rows)["cpu-int4"]
        chosen[budget] = facts["block_size"]
        assert facts["drift_kl"] == min(trial["drift_kl"] for trial in facts["tried"])
    assert chosen == {1e-7: 16, 10.0: 128}


def test_what_cannot_be_measured_here_gets_the_most_exact_blocks(
    tiny_model: Path, train_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_step, "cannot_run", lambda provider: "this machine has no GPU")
    config = QuantizeConfig(variants=["cuda-int4"], block_sizes=[32, 128])
    facts = facts_of(config, tiny_model, tmp_path / "variants", train_rows)["cuda-int4"]
    assert (facts["block_size"], facts["ran"]) == (32, False)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, vocab_size=1027, tie_word_embeddings=True),
        LlamaConfig(**SIZES, vocab_size=1027, tie_word_embeddings=False),
        Qwen3Config(**SIZES, vocab_size=1024, head_dim=32, tie_word_embeddings=True),
        Phi3Config(**SIZES, vocab_size=1024, original_max_position_embeddings=512, tie_word_embeddings=False),
    ],
    ids=["tied, odd vocabulary", "untied, odd vocabulary", "norms of queries and keys", "fused projections"],
)
def test_kinds_of_models(config: PreTrainedConfig, tiny_model: Path, tmp_path: Path) -> None:
    """In 8 bits each is almost the model itself: nothing is cut, packed or tied at the wrong place."""
    model = make_model(tmp_path / "model", config, tiny_model)
    rows = write_dataset(tmp_path / "rows", commands(100, seed=1))
    settings = QuantizeConfig(
        variants=["cpu-int8", "cpu-int4", "cpu-int4-gptq", "cpu-int4-awq", "cpu-int4-mixed"], drift_budget=0.03
    )
    facts = facts_of(settings, model, tmp_path / "variants", rows)
    assert facts["cpu-int8"]["drift_kl"] < 0.02
    assert facts["cpu-int4-mixed"]["drift_kl"] < 0.05
    assert facts["cpu-int4-gptq"]["drift_kl"] < facts["cpu-int4"]["drift_kl"]
    assert facts["cpu-int4-awq"]["drift_kl"] < facts["cpu-int4"]["drift_kl"]
    prompts = [[{"role": "user", "content": "lamp " * count}] for count in (1, 5, 20)]
    for name in settings.variants:
        variant = tmp_path / "variants" / name
        served = open_runtime(variant, quantized=True, dtype="auto", num_threads=1, batch_size=3)
        assert isinstance(served, BatchedRuntime)
        assert LOGITS_FROM in served.slots._inputs
        assert served.answer(prompts, 12) == GenAIRuntime(variant, num_threads=1).answer(prompts, 12)


def test_a_head_in_8_bits_drifts_less(wild_model: Path, train_rows: Path, tmp_path: Path) -> None:
    found = {}
    for bits in (4, 8):
        config = QuantizeConfig(variants=["cpu-int4", "cpu-int4-gptq"], block_size=128, head_bits=bits)
        found[bits] = facts_of(config, wild_model, tmp_path / str(bits), train_rows)
    for name in found[4]:
        assert found[8][name]["drift_kl"] < found[4][name]["drift_kl"]
        assert found[8][name]["num_weights_by_bits"] == {"4": 2 * 147_456, "8": 1027 * 128}


def test_widths_that_a_block_does_not_divide(tiny_model: Path, train_rows: Path, tmp_path: Path) -> None:
    """Plain rounding fills up the last block; the others say which width it is."""
    sizes = SIZES | {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 3}
    model = make_model(tmp_path / "model", LlamaConfig(**sizes, vocab_size=1024, tie_word_embeddings=True), tiny_model)
    facts = facts_of(
        QuantizeConfig(variants=["cpu-int4", "cpu-int8"], block_size=64), model, tmp_path / "variants", train_rows
    )
    assert facts["cpu-int8"]["drift_kl"] < 0.02
    assert facts["cpu-int4"]["ran"]
    config = QuantizeConfig(variants=["cpu-int4-gptq"], block_size=64)
    with pytest.raises(ModelError, match="blocks of 64 weights do not divide the model's widths 96, 160; choose"):
        run(config, model=model, variants=tmp_path / "gptq", calibration=train_rows)
    with pytest.raises(ModelError, match="96, 160 into an even number"):
        run(QuantizeConfig(variants=["cpu-int4-kquant"]), model=model, variants=tmp_path / "kquant")


def test_an_architecture_that_the_exporter_does_not_know_is_named(
    tiny_model: Path, train_rows: Path, tmp_path: Path
) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="the exporter does not know the architecture GPT2LMHeadModel"):
        run(QuantizeConfig(), model=tmp_path / "gpt2", variants=tmp_path / "variants")
    config = QuantizeConfig(variants=["cpu-int4-gptq", "cpu-int4-awq"])
    with pytest.raises(ModelError, match=r"(?s)2 of 2 variants.*reads the architecture GPT2.*layers of a gpt2 model"):
        run(config, model=tmp_path / "gpt2", variants=tmp_path / "variants", calibration=train_rows)
    assert not (tmp_path / "variants").exists()


@pytest.mark.parametrize("variant", ["cpu-int4-kquant", "cpu-int8", "cpu-int4"])
def test_other_sizes_names_are_no_crash(variant: str, tiny_model: Path, tmp_path: Path) -> None:
    """GPT-2 has no intermediate_size, so that nothing can be said of blocks; what the exporter says counts."""
    config = GPT2Config(vocab_size=1024, n_positions=64, n_embd=64, n_layer=1, n_head=2, eos_token_id=2)
    model = make_model(tmp_path / "gpt2", config, tiny_model)
    with pytest.raises(ModelError, match="the exporter does not know the architecture GPT2LMHeadModel"):
        run(QuantizeConfig(variants=[variant]), model=model, variants=tmp_path / "variants")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"architectures": ["FooForCausalLM"], "model_type": "foo"},
            r"does not know the architecture FooForCausalLM \(model_type 'foo'\) of .*; use a model of another family",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, r"holds quantized weights \(fp8\), .* rounded twice; give"),
    ],
)
def test_models_that_nothing_here_can_read_are_refused_before_anything_is_built(
    change: dict[str, Any], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=said):
        run(QuantizeConfig(), model=model, variants=tmp_path / "variants")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_tied_embedding_that_config_json_does_not_state_is_stored_once(tiny_model: Path, tmp_path: Path) -> None:
    """SmolLM3's is tied unless its config says otherwise, so that a config of an older version leaves it out."""
    sizes = SIZES | {"num_hidden_layers": 1}
    model = make_model(tmp_path / "model", SmolLM3Config(**sizes, vocab_size=4096), tiny_model)
    stated = json.loads((model / "config.json").read_text())
    found = {}
    for name, config in (("stated", stated), ("left out", {k: v for k, v in stated.items() if "tie" not in k})):
        (model / "config.json").write_text(json.dumps(config))
        found[name] = facts_of(QuantizeConfig(variants=["cpu-int8"]), model, tmp_path / name)["cpu-int8"]["size_bytes"]
    assert stated["tie_word_embeddings"] is True
    assert found["left out"] == found["stated"]


def test_a_variant_whose_answers_are_no_numbers_is_not_taken_for_a_good_one(
    tiny_model: Path, train_rows: Path, tmp_path: Path
) -> None:
    """Every weight is finite, but not what comes of them."""
    model = tmp_path / "overflowing"
    shutil.copytree(tiny_model, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 1e38
    tensors["model.embed_tokens.weight"] *= 1e10
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its divergence from the model in full precision is nan"):
        run(QuantizeConfig(), model=model, variants=tmp_path / "variants", calibration=train_rows)
    assert not (tmp_path / "variants").exists()


def test_all_failures_come_together_and_what_was_built_is_not_built_again(
    wild_model: Path, train_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig(variants=["cpu-int4-gptq", "cpu-int4", "cpu-int4-awq"], block_size=256)
    inputs = {"model": wild_model, "variants": tmp_path / "variants", "calibration": train_rows}
    with pytest.raises(ModelError, match=r"(?s)2 of 3 variants.*cpu-int4-gptq: blocks of 256.*cpu-int4-awq: blocks of"):
        run(config, **inputs)
    assert not (tmp_path / "variants").exists()
    cut_short(next(tmp_path.glob("*.work")) / "cpu-int4.json")
    with pytest.raises(ModelError, match=r"2 of 3 variants"):
        run(config, **inputs)
    monkeypatch.setattr(quantize_step, "BACKENDS", {})  # whatever is built now fails
    facts = run(config.model_copy(update={"variants": ["cpu-int4"]}), **inputs).facts
    assert facts["variants"]["cpu-int4"]["ran"]
    assert not list(tmp_path.glob("*.work"))


def cut_short(file: Path) -> None:
    """As a kill leaves a file that was being written."""
    file.write_bytes(file.read_bytes()[:-40])


def test_weights_that_are_no_numbers_are_named_before_anything_is_built(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight has 1 weights that are not finite"):
        run(QuantizeConfig(), model=tmp_path / "broken", variants=tmp_path / "variants")


@pytest.mark.parametrize("variant", ["cpu-int4-gptq", "cpu-int4-awq", "cpu-int4-mixed"])
def test_calibration_rows_of_too_few_tokens_are_said_to_be(variant: str, tiny_model: Path, tmp_path: Path) -> None:
    few = write_dataset(tmp_path / "few", commands(10, seed=1))
    with pytest.raises(DataError, match=r"10 calibration rows .* leave \d+ tokens to measure on, at least 512"):
        run(QuantizeConfig(variants=[variant]), model=tiny_model, variants=tmp_path / "variants", calibration=few)
    with pytest.raises(DataError, match="all 10 rows are longer than max_length=16 tokens"):
        run(
            QuantizeConfig(variants=[variant], calibration_max_length=16),
            model=tiny_model,
            variants=tmp_path / "variants",
            calibration=few,
        )


def test_rows_that_are_shorter_than_a_block_calibrate_as_well(wild_model: Path, tmp_path: Path) -> None:
    """A block is of weights, and needs no row of its length."""
    tokenizer = AutoTokenizer.from_pretrained(wild_model)
    all_rows = commands(400, seed=1)
    short = sorted(all_rows, key=lambda row: len(encode(tokenizer, turns(row), to_answer=False)))[:100]
    rows = write_dataset(tmp_path / "short", short)
    assert len(encode(tokenizer, turns(short[-1]), to_answer=False)) < 64
    config = QuantizeConfig(variants=["cpu-int4", "cpu-int4-gptq", "cpu-int4-awq"], block_size=128)
    facts = facts_of(config, wild_model, tmp_path / "variants", rows)
    for name in ("cpu-int4-gptq", "cpu-int4-awq"):
        assert facts[name]["drift_kl"] < 1.2 * facts["cpu-int4"]["drift_kl"], "few rows, but no nonsense"


def turns(record: ChatRecord) -> list[dict[str, str]]:
    return [message.model_dump() for message in record.messages]


def test_calibrated_variants_need_rows(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cpu-int4-awq need calibration rows"):
        run(QuantizeConfig(variants=["cpu-int4-awq"]), model=tiny_model, variants=tmp_path / "variants")
    with pytest.raises(ConfigError, match="block_sizes are chosen by drift on calibration rows"):
        run(QuantizeConfig(block_sizes=[32, 64]), model=tiny_model, variants=tmp_path / "variants")


def test_what_is_known_not_to_work_is_refused_with_the_reason() -> None:
    for name in REFUSED:
        with pytest.raises(ConfigError, match=f"{name} cannot be built: "):
            QuantizeConfig.create({"variants": [name]})
    with pytest.raises(ConfigError, match="'cpu-int5' is no variant; there are cpu-int4, "):
        QuantizeConfig.create({"variants": ["cpu-int5"]})
    with pytest.raises(ConfigError, match="each variant once"):
        QuantizeConfig.create({"variants": ["cpu-int4", "cpu-int4"]})


def test_the_matrix_says_which_class_runs_what(tiny_model: Path, tmp_path: Path) -> None:
    classes = {
        "laptop": DEVICE_CLASS,
        "gpu": DEVICE_CLASS | {"execution_provider": "cuda"},
        "phone": DEVICE_CLASS | {"execution_provider": "qnn", "architecture": "aarch64"},
    }
    config = QuantizeConfig(variants=["cpu-int4", "cuda-int4"], device_classes=classes)
    facts = run(config, model=tiny_model, variants=tmp_path / "variants").facts
    assert facts["classes"]["laptop"] == {"variants": ["cpu-int4"]}
    assert facts["classes"]["gpu"] == {"variants": ["cuda-int4"]}
    assert facts["classes"]["phone"]["variants"] == []
    assert "Qualcomm" in facts["classes"]["phone"]["not_buildable"]
    with pytest.raises(ConfigError, match="no device class can run cuda-fp16; the classes are laptop"):
        QuantizeConfig.create({"variants": ["cpu-int4", "cuda-fp16"], "device_classes": {"laptop": DEVICE_CLASS}})
    with pytest.raises(ConfigError, match="laptop: DeviceClass"):
        QuantizeConfig.create({"device_classes": {"laptop": {}}})


def test_a_variant_that_does_not_load_does_not_count(tiny_variants: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (tiny_variants / "cpu-int4").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    settings = json.loads((broken / "genai_config.json").read_text())
    settings["model"]["decoder"]["filename"] = "absent.onnx"
    (broken / "genai_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"cannot be loaded by onnxruntime.*absent\.onnx"):
        check_runs(broken)


def test_a_job_reads_nothing_that_no_variant_needs(tiny_model: Path, tmp_path: Path) -> None:
    job = Job(QuantizeConfig(), tiny_model, tmp_path / "absent", tmp_path)
    assert job.tied
    assert job.widths == {128, 256}
    assert job.divides(128)
    assert not job.divides(256)


def test_a_variant_is_a_model_of_foundry_locals_cache(tiny_model: Path, tmp_path: Path) -> None:
    run(QuantizeConfig(model_name="building"), model=tiny_model, variants=tmp_path / "variants")
    content = json.loads((tmp_path / "variants" / "cpu-int4" / "inference_model.json").read_text())
    assert content["Name"] == "building-cpu-int4"
    assert "{Content}" in content["PromptTemplate"]["prompt"]
