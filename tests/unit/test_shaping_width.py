"""Less width: what goes and was zero changes no logits, in each architecture, and what stays is the most active."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from slmops.errors import ModelError
from slmops.shaping.width import (
    Width,
    WidthImportance,
    choose_width,
    kept_fractions,
    measure_width,
    narrow,
    weigh_width,
)
from slmops.torch_models import quiet_libraries
from slmops.training.batches import Batch, Row, collate

HIDDEN, CHANNELS, HEADS, GROUPS, LAYERS = 48, 64, 6, 3, 3
SMALLER = {"hidden_size": 36, "intermediate_size": 32, "num_key_value_heads": 2}
DEAD_HIDDEN = [number for number in range(HIDDEN) if number % 4 == 1]
TOKENS = torch.arange(1, 21).view(2, 10)

ARCHITECTURES = [
    pytest.param(LlamaConfig, {}, id="llama"),
    pytest.param(LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, id="biases"),
    pytest.param(
        Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, id="sliding windows"
    ),
    pytest.param(Qwen3Config, {"head_dim": 16, "attention_bias": True}, id="norms of queries and keys"),
    pytest.param(SmolLM3Config, {}, id="layers without rotary positions"),
    pytest.param(Phi3Config, {}, id="fused projections"),
    pytest.param(MistralConfig, {"head_dim": 4}, id="mistral"),
]


def tiny(kind: Any, **settings: Any) -> PreTrainedModel:
    """Random weights, biases and norms, all large enough to be noticed; a large epsilon, for the same reason."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": CHANNELS, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "pad_token_id": 0, "eos_token_id": None}
    config = kind(vocab_size=64, **(sizes | heads | {"rms_norm_eps": 1e-2} | settings))
    with quiet_libraries():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = 0.3 * torch.randn(weight.shape, generator=generator)
        weight.data = 1 + noise if "norm" in name else noise
    model.eval()
    return model


def dead_channels(layer: int) -> list[int]:
    return [number for number in range(CHANNELS) if (number + layer) % 2]


def kill(model: PreTrainedModel) -> None:
    """A quarter of the residual stream, half of the channels and a third of the heads are never anything but zero."""
    decoder: Any = model.base_model
    decoder.embed_tokens.weight.data[:, DEAD_HIDDEN] = 0
    head_dim = decoder.layers[0].self_attn.head_dim
    for number, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for writer in (attention.o_proj, mlp.down_proj):
            _zero(writer, DEAD_HIDDEN)
        fused = hasattr(mlp, "gate_up_proj")
        channels, offset = dead_channels(number), CHANNELS if fused else 0
        _zero(mlp.gate_up_proj if fused else mlp.up_proj, [offset + channel for channel in channels])
        group, offset = number % GROUPS, (HEADS + GROUPS) * head_dim if fused else 0
        rows = [offset + group * head_dim + row for row in range(head_dim)]
        _zero(attention.qkv_proj if fused else attention.v_proj, rows)


def _zero(linear: Any, rows: list[int]) -> None:
    linear.weight.data[rows] = 0
    if linear.bias is not None:
        linear.bias.data[rows] = 0


def calibration() -> list[Batch]:
    rows = [Row(0, list(range(1, 20)), [3]), Row(1, list(range(30, 44)), [3])]
    return [collate(rows, 0, torch.device("cpu"))]


def layer_of(model: PreTrainedModel, number: int) -> Any:
    decoder: Any = model.base_model
    return decoder.layers[number]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=TOKENS).logits
    return result


def reloaded(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    with quiet_libraries():
        model.save_pretrained(directory)
        again: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory)
    return again


@pytest.mark.parametrize("measured", [True, False], ids=["by activations", "by weights"])
@pytest.mark.parametrize(("kind", "settings"), ARCHITECTURES)
def test_what_is_always_zero_goes_and_the_logits_stay(
    kind: Any, settings: dict[str, Any], measured: bool, tmp_path: Path
) -> None:
    model = tiny(kind, **settings)
    kill(model)
    before = logits(model)
    layers = range(LAYERS)
    importance = measure_width(model, layers, calibration()) if measured else weigh_width(model, layers)
    width = choose_width(importance, SMALLER)
    assert not set(width.hidden) & set(DEAD_HIDDEN)
    assert not any(set(kept) & set(dead_channels(number)) for number, kept in enumerate(width.channels))
    assert width.groups == [[1, 2], [0, 2], [0, 1]]
    assert set(kept_fractions(importance, width).values()) == {1.0}

    student = narrow(model, width).eval()
    torch.testing.assert_close(logits(student), before, rtol=1e-4, atol=1e-4)
    again = reloaded(student, tmp_path / "student")
    torch.testing.assert_close(logits(again), logits(student))
    expected = SMALLER | {"num_attention_heads": 4, "head_dim": settings.get("head_dim", HIDDEN // HEADS)}
    assert {name: getattr(again.config, name) for name in expected} == expected


@pytest.mark.parametrize(("kind", "settings"), ARCHITECTURES)
def test_every_weight_has_the_shape_that_the_sizes_say(kind: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """Counted by hand, against a mistake that the model and its config would share."""
    model = tiny(kind, **settings)
    student = narrow(model, choose_width(weigh_width(model, range(LAYERS)), SMALLER))
    head_dim = settings.get("head_dim", 8)
    layer = layer_of(student, 1)
    assert tuple(layer.self_attn.o_proj.weight.shape) == (36, 4 * head_dim)
    assert tuple(layer.mlp.down_proj.weight.shape) == (36, 32)
    assert tuple(student.get_output_embeddings().weight.shape) == (64, 36)
    if hasattr(layer.mlp, "gate_up_proj"):
        assert tuple(layer.self_attn.qkv_proj.weight.shape) == ((4 + 2 + 2) * head_dim, 36)
        assert tuple(layer.mlp.gate_up_proj.weight.shape) == (64, 36)
    else:
        assert tuple(layer.self_attn.k_proj.weight.shape) == (2 * head_dim, 36)
        assert tuple(layer.mlp.up_proj.weight.shape) == (32, 36)
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


def test_the_kept_heads_are_whole_groups_of_the_models_own() -> None:
    model = tiny(LlamaConfig)
    everything = list(range(HIDDEN)), [list(range(CHANNELS))] * LAYERS
    student = narrow(model, Width(*everything, groups=[[0, 2], [1, 2], [0, 1]]))
    theirs, ours = (layer_of(each, 1).self_attn for each in (model, student))
    assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight[16:48])  # heads 2 to 5 of 8 rows each
    assert torch.equal(ours.k_proj.weight, theirs.k_proj.weight[8:24])
    assert torch.equal(ours.o_proj.weight, theirs.o_proj.weight[:, 16:48])
    assert student.config.rms_norm_eps == model.config.rms_norm_eps


def test_a_narrower_model_generates_the_same_with_and_without_its_cache() -> None:
    model = tiny(LlamaConfig)
    student = narrow(model, choose_width(weigh_width(model, range(LAYERS)), SMALLER)).eval()
    answers = [
        student.generate(TOKENS, do_sample=False, max_new_tokens=8, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*answers)


def test_the_most_active_parts_stay() -> None:
    """Against activations that are read off module by module."""
    model = tiny(LlamaConfig)
    decoder: Any = model.base_model
    norms = [norm for layer in decoder.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    read, written = activations(model, [decoder.layers[1].mlp.down_proj, *norms, decoder.norm])
    width = choose_width(measure_width(model, range(LAYERS), calibration()), SMALLER)
    assert width.channels[1] == sorted(read[0].topk(32).indices.tolist())
    assert width.hidden == sorted(torch.stack(written[1:]).mean(0).topk(36).indices.tolist())


def activations(model: PreTrainedModel, modules: list[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Mean absolute input and output of each module over the calibration's tokens."""
    (batch,) = calibration()
    assert batch.attention_mask is not None
    tokens = batch.attention_mask.bool()
    seen: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in modules:
        module.register_forward_hook(lambda module, args, made: seen.update({module: (args[0], made)}))
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    read, written = ([seen[module][side][tokens].abs().mean(0) for module in modules] for side in (0, 1))
    return read, written


def test_importance_can_be_asked_of_some_layers_alone() -> None:
    model = tiny(LlamaConfig)
    whole = measure_width(model, range(LAYERS), calibration())
    some = measure_width(model, [0, 2], calibration())
    assert some.channels == [whole.channels[0], whole.channels[2]]
    assert some.groups == [whole.groups[0], whole.groups[2]]
    assert len(weigh_width(model, [2]).channels) == 1


def test_of_equal_parts_the_first_stay() -> None:
    alike = WidthImportance([1.0] * 4, [[1.0, 2.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]])
    width = choose_width(alike, {"hidden_size": 2, "intermediate_size": 3, "num_key_value_heads": 1})
    assert width == Width([0, 1], [[0, 1, 2]], [[0]])
    assert kept_fractions(alike, width) == {
        "hidden_size": 0.5, "intermediate_size": 0.8, "num_key_value_heads": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [(Gemma2Config, {"head_dim": 8}, "Gemma2ForCausalLM"), (Olmo2Config, {}, "Olmo2ForCausalLM")],
)
def test_an_architecture_whose_weights_mean_something_else_is_named(
    kind: Any, settings: dict[str, Any], name: str
) -> None:
    model = tiny(kind, **settings)
    with pytest.raises(ModelError, match=rf"{name} .* cannot be cut .* because of its .*post_feedforward_layernorm"):
        weigh_width(model, range(LAYERS))


def test_a_module_that_a_known_architecture_does_not_have_is_named() -> None:
    model = tiny(LlamaConfig)
    layer_of(model, 0).self_attn.gate = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="because of its gate"):
        weigh_width(model, range(LAYERS))
