"""prune: what is cut is gone, what stays answers as before, and what cannot be cut is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PhiConfig, PreTrainedModel, Qwen3Config

from slmops import artifacts, models, torch_models
from slmops.demo import building_commands
from slmops.demo.models import SMOLLM2
from slmops.errors import ArtifactError, ConfigError, DataError, ModelError
from slmops.inference.genai import GenAIRuntime
from slmops.prune.config import PruneConfig
from slmops.prune.run import run
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.run import run as quantize
from slmops.records import ChatRecord
from slmops.shaping.sparsity import prune_matrix
from slmops.training.batches import encode
from tests.datasets import chat_record, commands, write_dataset

CPU = torch.device("cpu")
DOMAIN = PruneConfig(vocabulary="domain", min_vocab_size=0, vocab_multiple=8)
REAL_MODEL = Path(".work/models") / SMOLLM2


def load(path: Path) -> PreTrainedModel:
    return torch_models.load_model(path, dtype=torch.float32, device=CPU)


@torch.no_grad()
def logits(path: Path, record: ChatRecord) -> tuple[list[str], torch.Tensor]:
    """The tokens of a row, and [T, V] the model's logits at each."""
    tokenizer = torch_models.load_tokenizer(path)
    ids = encode(tokenizer, [message.model_dump() for message in record.messages], to_answer=False)
    found: torch.Tensor = load(path)(input_ids=torch.tensor([ids])).logits[0]
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in ids], found


def kept_rows(before: Path, after: Path) -> list[int]:
    """For each token id of the smaller model, its id in the larger one."""
    old = AutoTokenizer.from_pretrained(before).get_vocab()
    new: dict[str, int] = AutoTokenizer.from_pretrained(after).get_vocab()
    return [old[token] for token in sorted(new, key=new.__getitem__)]


def with_tokenizer(model: PreTrainedModel, tokenizer: Path, path: Path) -> Path:
    torch_models.save_model(model, torch_models.load_tokenizer(tokenizer), path)
    return path


def random_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Weights and biases that all matter to the logits."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def domain_model(tiny_teacher: Path, train_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with the vocabulary of the rows that it was trained on."""
    path = tmp_path_factory.mktemp("pruned") / "domain"
    run(DOMAIN, model=tiny_teacher, calibration=train_rows, pruned=path)
    return path


def test_logits_of_the_domain_are_those_of_the_whole_model(
    tiny_teacher: Path, domain_model: Path, held_out_rows: Path
) -> None:
    rows = kept_rows(tiny_teacher, domain_model)
    assert len(rows) < 700 < models.read_config(tiny_teacher)["vocab_size"]
    for record in commands(5, seed=1):
        tokens, before = logits(tiny_teacher, record)
        same_tokens, after = logits(domain_model, record)
        assert same_tokens == tokens
        torch.testing.assert_close(after, before[:, rows])


def test_facts_and_files_say_what_stayed(tiny_teacher: Path, domain_model: Path) -> None:
    sidecar = artifacts.read(domain_model)
    facts, config = sidecar.facts, models.read_config(domain_model)
    assert facts["vocab_size"] == config["vocab_size"] == len(kept_rows(tiny_teacher, domain_model))
    assert facts["vocab_size"] % 8 == 0
    assert facts["vocab_size_before"] == 1024
    assert facts["num_parameters"] == models.num_weights(domain_model)
    assert facts["num_parameters_before"] == models.num_weights(tiny_teacher)
    counts = [facts[f"num_{kind}_tokens"] for kind in ("domain", "required", "filled")]
    assert sum(counts) == facts["vocab_size"]
    assert facts["tokenizer_digest"] == models.tokenizer_digest(domain_model) != models.tokenizer_digest(tiny_teacher)
    assert models.template_digest(domain_model) == models.template_digest(tiny_teacher)
    assert {entry.path for entry in sidecar.files} == {
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


def test_special_tokens_mean_the_same_in_config_generation_and_tokenizer(domain_model: Path) -> None:
    tokenizer = torch_models.load_tokenizer(domain_model)
    model = load(domain_model)
    for part in (model.config, model.generation_config):
        for name, token in (("bos", "<|im_start|>"), ("eos", "<|im_end|>"), ("pad", "<|im_end|>")):
            found = getattr(part, f"{name}_token_id")
            assert tokenizer.convert_ids_to_tokens(found) == token
            assert found == getattr(tokenizer, f"{name}_token_id")


def test_teacher_and_student_get_the_same_tokenizer_from_the_same_rows(
    tiny_model: Path, domain_model: Path, train_rows: Path, tmp_path: Path
) -> None:
    """So that one can still teach the other by its logits."""
    config = DOMAIN.model_copy(update={"keep_layers": [0, 3]})
    facts = run(config, model=tiny_model, calibration=train_rows, pruned=tmp_path / "student").facts
    assert facts["tokenizer_digest"] == artifacts.read(domain_model).facts["tokenizer_digest"]
    assert facts["kept_layers"] == [0, 3]
    assert load(tmp_path / "student").config.num_hidden_layers == 2


@pytest.mark.parametrize("variant", ["cpu-int4", "cpu-int8"])
def test_the_quantized_model_answers_as_the_one_with_all_tokens(
    variant: Any, tiny_teacher: Path, domain_model: Path, train_rows: Path, tmp_path: Path
) -> None:
    """A row of the embedding has scales of its own, so leaving others out changes none of its numbers."""
    config = QuantizeConfig(variants=[variant])
    answers = []
    for model in (tiny_teacher, domain_model):
        quantize(config, model=model, variants=tmp_path / model.name)
        runtime = GenAIRuntime(tmp_path / model.name / variant, num_threads=1)
        answers.append(runtime.answer([record.prompt for record in commands(20, seed=1)], 16))
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 3
    sizes = [sum(file.stat().st_size for file in (tmp_path / m.name).rglob("*")) for m in (tiny_teacher, domain_model)]
    assert sizes[1] < 0.9 * sizes[0]


def test_layers_go_by_importance_and_width_with_them(tiny_teacher: Path, train_rows: Path, tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2}
    facts = run(PruneConfig(shape=shape), model=tiny_teacher, calibration=train_rows, pruned=tmp_path / "small").facts
    importance = facts["layer_importance"]
    assert facts["kept_layers"] == sorted(sorted(range(4), key=lambda layer: -importance[layer])[:2])
    config = models.read_config(tmp_path / "small")
    assert {name: config[name] for name in shape} == shape
    assert config["num_key_value_heads"] == 1
    assert facts["vocab_size"] == facts["vocab_size_before"] == 1024
    assert facts["num_parameters"] == models.num_weights(tmp_path / "small") < facts["num_parameters_before"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param(PhiConfig, {}, id="a head with a bias"),
        pytest.param(Qwen3Config, {"head_dim": 16, "num_key_value_heads": 2}, id="a head without"),
    ],
)
def test_embeddings_of_each_kind_with_more_rows_than_tokens(
    kind: Any, settings: dict[str, Any], tied: bool, tiny_model: Path, train_rows: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 1100, "pad_token_id": 1050, "eos_token_id": [1, 2], "bos_token_id": None}
    whole = kind(tie_word_embeddings=tied, **sizes, **ids, **settings)
    before = with_tokenizer(random_weights(AutoModelForCausalLM.from_config(whole)), tiny_model, tmp_path / "before")
    facts = run(DOMAIN, model=before, calibration=train_rows, pruned=tmp_path / "after").facts
    after = models.read_config(tmp_path / "after")
    assert after["eos_token_id"] == [1, 2]
    # A row that only the config knows stays, as the last, because ids keep their order.
    assert after["pad_token_id"] == after["vocab_size"] - 1
    rows = [*kept_rows(before, tmp_path / "after"), 1050]
    assert facts["vocab_size"] == len(rows) < 1024
    record = commands(1, seed=1)[0]
    torch.testing.assert_close(logits(tmp_path / "after", record)[1], logits(before, record)[1][:, rows])


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"])
def test_directories_of_older_versions_of_transformers_leave_no_old_ids(
    kind: str, tiny_model: Path, train_rows: Path, tmp_path: Path
) -> None:
    """They hold the vocabulary three times: two more files, and added tokens by id."""
    old = with_tokenizer(load(tiny_model), tiny_model, tmp_path / "old")
    content = json.loads((old / "tokenizer.json").read_text())
    (old / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (old / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, content["model"]["merges"])]))
    settings = json.loads((old / "tokenizer_config.json").read_text()) | {"tokenizer_class": kind}
    added = {str(entry.pop("id")): entry for entry in content["added_tokens"]}
    (old / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    run(DOMAIN, model=old, calibration=train_rows, pruned=tmp_path / "pruned")
    assert not [file for file in ("vocab.json", "merges.txt") if (tmp_path / "pruned" / file).exists()]
    assert "added_tokens_decoder" not in (tmp_path / "pruned" / "tokenizer_config.json").read_text()
    record = commands(1, seed=1)[0]
    tokens, before = logits(old, record)
    same_tokens, after = logits(tmp_path / "pruned", record)
    assert same_tokens == tokens
    torch.testing.assert_close(after, before[:, kept_rows(old, tmp_path / "pruned")])


def test_a_vocabulary_that_is_in_use_altogether_stays_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    tokens = list(AutoTokenizer.from_pretrained(tiny_model).get_vocab())
    text = AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_string(sorted(tokens, key=len)[-600:])
    rows = write_dataset(tmp_path / "rows", [chat_record(text, "on")])
    config = PruneConfig(vocabulary="domain", min_vocab_size=1020, vocab_multiple=128)
    facts = run(config, model=tiny_model, calibration=rows, pruned=tmp_path / "same").facts
    assert facts["vocab_size"] == 1024
    assert kept_rows(tiny_model, tmp_path / "same") == list(range(1024))


@pytest.mark.parametrize(("sparsity", "fraction"), [("2:4", 0.5), ("unstructured", 0.3)])
def test_zeros_are_where_they_were_asked_for(
    sparsity: Any, fraction: float, tiny_teacher: Path, train_rows: Path, tmp_path: Path
) -> None:
    config = PruneConfig(sparsity=sparsity, sparsity_fraction=0.3, max_calibration_rows=64)
    facts = run(config, model=tiny_teacher, calibration=train_rows, pruned=tmp_path / "sparse").facts
    assert facts["zero_fraction"] == pytest.approx(fraction, abs=0.001)
    weights = load_file(tmp_path / "sparse" / "model.safetensors")
    matrices = {name: weight for name, weight in weights.items() if weight.dim() > 1 and "layers" in name}
    assert len(matrices) == 4 * 7
    for weight in matrices.values():
        assert (weight == 0).float().mean().item() == pytest.approx(fraction, abs=0.01)
        if sparsity == "2:4":
            assert ((weight.view(len(weight), -1, 4) == 0).sum(-1) == 2).all()
    assert not (weights["model.embed_tokens.weight"] == 0).any()


@pytest.mark.parametrize(("pattern", "fraction", "olives"), [("2:4", 0.5, [2, 4]), ("unstructured", 0.4, 0.4)])
def test_zeros_and_other_weights_are_those_of_olives_sparsegpt(pattern: Any, fraction: float, olives: Any) -> None:
    """Olive's pass does not run with this transformers; what it does to one matrix does."""
    from olive.passes.pytorch.sparsegpt_utils import SparseGPTModule

    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(200, 200, generator=generator)
    inputs = torch.randn(1000, 200, generator=generator) @ mixing
    inputs[:, 7] = 0
    linear = torch.nn.Linear(200, 48)
    linear.weight.data = torch.randn(48, 200, generator=generator)
    ours = prune_matrix(linear.weight.data, inputs.T @ inputs, pattern, fraction)
    dense = linear.weight.detach().clone()
    reference = SparseGPTModule(linear)
    reference.add_batch(inputs[None])
    n, m = olives if pattern == "2:4" else (0, 0)
    reference.prune("structured" if pattern == "2:4" else "unstructured", olives, n, m)
    # Olive's threshold takes one weight more with it in each block of columns, and its row changes with it.
    assert ((ours == 0) == (linear.weight == 0)).float().mean() > 0.998
    assert torch.isclose(ours, linear.weight.detach(), rtol=1e-3, atol=1e-3).float().mean() > 0.99
    plain = torch.where(ours == 0, 0, dense)
    losses = [((inputs @ (weight - dense).T) ** 2).mean() for weight in (ours, plain)]
    assert losses[0] < 0.7 * losses[1]


NOTHING: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("settings", "error", "complaint"),
    [
        (NOTHING, ConfigError, "nothing is to be pruned; set shape, keep_layers, sparsity or vocabulary"),
        ({"shape": {"num_hidden_layers": 0}}, ConfigError, "num_hidden_layers must be 1 or more, got 0"),
        ({"keep_layers": [0, 9]}, ConfigError, "each from 0 to 3, got"),
        ({"shape": {"vocab_size": 512}}, ConfigError, "vocab_size"),
        ({"vocabulary": "domain", "min_vocab_size": 4096}, ConfigError, "leaves out none of the model's 1024 tokens"),
        ({"sparsity": "unstructured", "max_length": 3}, DataError, "longer than max_length=3 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_left(
    settings: dict[str, Any], error: Any, complaint: str, tiny_model: Path, train_rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=complaint):
        run(PruneConfig.create(settings), model=tiny_model, calibration=train_rows, pruned=tmp_path / "pruned")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused_by_name(tiny_model: Path, train_rows: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, :2] = torch.tensor([torch.nan, torch.inf])
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"2 of the weights model\.layers\.2\.mlp\.up_proj\.weight are NaN or infinite"
    ):
        run(PruneConfig(keep_layers=[0, 1]), model=broken, calibration=train_rows, pruned=tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"shape": {"hidden_size": 32}}, r"cannot be cut to another hidden_size: that is known for llama, mistral, "),
        ({"keep_layers": [0]}, "GPT2LMHeadModel states no num_hidden_layers as a number; use another model"),
        (
            {"sparsity": "2:4"},
            "GPT2LMHeadModel does not keep its layers in a list that is known here.*thinned out; use",
        ),
    ],
)
def test_an_architecture_that_is_not_known_is_refused_with_what_to_do(
    settings: dict[str, Any], complaint: str, tiny_model: Path, train_rows: Path, tmp_path: Path
) -> None:
    gpt2 = GPT2Config(vocab_size=1024, n_positions=512, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    model = with_tokenizer(AutoModelForCausalLM.from_config(gpt2), tiny_model, tmp_path / "gpt2")
    with pytest.raises(ModelError, match=complaint):
        run(PruneConfig.create(settings), model=model, calibration=train_rows, pruned=tmp_path / "pruned")
    assert [entry.name for entry in tmp_path.iterdir()] == ["gpt2"]


def test_an_architecture_that_not_even_transformers_knows_is_named(
    tiny_model: Path, train_rows: Path, tmp_path: Path
) -> None:
    model = with_tokenizer(load(tiny_model), tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["Foo"], "model_type": "foo"}))
    with pytest.raises(ModelError, match=r"cannot be loaded as a causal language model \(model_type 'foo'\)"):
        run(PruneConfig(keep_layers=[0]), model=model, calibration=train_rows, pruned=tmp_path / "pruned")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_model_that_was_quantized_is_refused(tiny_model: Path, train_rows: Path, tmp_path: Path) -> None:
    model = with_tokenizer(load(tiny_model), tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    for settings in (DOMAIN, PruneConfig(keep_layers=[0])):
        with pytest.raises(ModelError, match="holds quantized weights"):
            run(settings, model=model, calibration=train_rows, pruned=tmp_path / "pruned")


def test_a_tokenizer_of_another_kind_is_refused(tiny_model: Path, train_rows: Path, tmp_path: Path) -> None:
    other = with_tokenizer(load(tiny_model), tiny_model, tmp_path / "other")
    tokenizer = Tokenizer(tokenizer_models.Unigram())
    tokenizer.train_from_iterator(["turn on the light"], trainers.UnigramTrainer(vocab_size=20, show_progress=False))
    tokenizer.save(str(other / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"a Unigram tokenizer; only .* set vocabulary=kept"):
        run(DOMAIN, model=other, calibration=train_rows, pruned=tmp_path / "pruned")


def test_settings_of_generation_that_mean_single_tokens_are_refused(
    tiny_model: Path, train_rows: Path, tmp_path: Path
) -> None:
    model = load(tiny_model)
    model.generation_config.bad_words_ids = [[700, 701]]
    other = with_tokenizer(model, tiny_model, tmp_path / "other")
    with pytest.raises(ModelError, match=r"generation_config\.json has bad_words_ids"):
        run(DOMAIN, model=other, calibration=train_rows, pruned=tmp_path / "pruned")


def test_suppressed_tokens_follow_to_their_new_ids(tiny_model: Path, train_rows: Path, tmp_path: Path) -> None:
    model = load(tiny_model)
    unused, used = 1023, AutoTokenizer.from_pretrained(tiny_model).encode(" light")[-1]
    model.generation_config.suppress_tokens = [used, unused]
    other = with_tokenizer(model, tiny_model, tmp_path / "other")
    run(DOMAIN, model=other, calibration=train_rows, pruned=tmp_path / "pruned")
    pruned = json.loads((tmp_path / "pruned" / "generation_config.json").read_text())
    assert [kept_rows(other, tmp_path / "pruned")[number] for number in pruned["suppress_tokens"]] == [used]


def test_calibration_must_be_there_and_hold_chats(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        run(DOMAIN, model=tiny_model, calibration=tmp_path / "absent", pruned=tmp_path / "pruned")
    with pytest.raises(DataError, match="has no rows"):
        run(DOMAIN, model=tiny_model, calibration=write_dataset(tmp_path / "empty", []), pruned=tmp_path / "pruned")


@pytest.mark.slow
@pytest.mark.skipif(not REAL_MODEL.is_dir(), reason="SmolLM2 was not fetched; `make demo` does")
def test_smollm2_says_the_same_about_commands_with_a_thirtieth_of_its_tokens(tmp_path: Path) -> None:
    rows = [chat_record(row["request"], row["command"]) for row in building_commands.make_rows(600)]
    calibration = write_dataset(tmp_path / "rows", rows)
    config = PruneConfig(vocabulary="domain", min_vocab_size=0)
    facts = run(config, model=REAL_MODEL, calibration=calibration, pruned=tmp_path / "pruned").facts
    assert facts["vocab_size_before"] > 30 * facts["vocab_size"]
    tokens, before = logits(REAL_MODEL, rows[0])
    same_tokens, after = logits(tmp_path / "pruned", rows[0])
    assert same_tokens == tokens
    torch.testing.assert_close(after, before[:, kept_rows(REAL_MODEL, tmp_path / "pruned")], rtol=1e-4, atol=1e-3)
