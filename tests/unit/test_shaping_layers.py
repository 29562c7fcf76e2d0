"""Fewer layers: rules choose what they say, importance is measured, and what is saved is what was in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from slmops.errors import ConfigError, DataError, ModelError
from slmops.shaping.importance import largest, rounded
from slmops.shaping.layers import block_influence, choose_layers, important_layers, keep_layers
from slmops.torch_models import quiet_libraries
from slmops.training.batches import Batch, Row, collate

CPU = torch.device("cpu")
TOKENS = torch.arange(1, 21).view(2, 10)


def tiny(kind: Any, **settings: Any) -> PreTrainedModel:
    """Six layers of random weights, large enough that each changes the logits."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = kind(vocab_size=64, num_hidden_layers=6, **(sizes | {"pad_token_id": 0, "eos_token_id": 1} | settings))
    with quiet_libraries():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    model.eval()
    return model


def silence(model: PreTrainedModel, *layers: int) -> None:
    """Have layers write nothing into the residual stream."""
    decoder: Any = model.base_model
    for number in layers:
        for projection in (decoder.layers[number].self_attn.o_proj, decoder.layers[number].mlp.down_proj):
            projection.weight.data.zero_()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=TOKENS).logits
    return result


def reloaded(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    with quiet_libraries():
        model.save_pretrained(directory)
        again: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory)
    return again


def batch(*lengths: int, packed: bool = False) -> Batch:
    rows = [
        Row(number, list(range(1 + number, 1 + number + length)), [length - 1]) for number, length in enumerate(lengths)
    ]
    return collate(rows, 0, CPU, packed=packed)


ARCHITECTURES = [
    pytest.param(LlamaConfig, {}, id="llama"),
    pytest.param(
        Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}, id="sliding windows"
    ),
    pytest.param(SmolLM3Config, {"no_rope_layer_interval": 3}, id="layers without rotary positions"),
    pytest.param(Qwen3Config, {"head_dim": 16}, id="qwen3"),
]


@pytest.mark.parametrize(("kind", "settings"), ARCHITECTURES)
def test_dropping_layers_that_do_nothing_changes_nothing_in_memory_or_on_disk(
    kind: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(kind, **settings)
    silence(model, 1, 3)
    before = logits(model)
    keep_layers(model, [0, 2, 4, 5])
    torch.testing.assert_close(logits(model), before)
    again = reloaded(model, tmp_path / "student")
    assert again.config.num_hidden_layers == 4
    torch.testing.assert_close(logits(again), before)


def test_what_the_config_says_of_each_layer_follows_the_layers() -> None:
    model = tiny(Qwen2Config, use_sliding_window=True, sliding_window=4, max_window_layers=3)
    keep_layers(model, [0, 3, 5])
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert model.config.max_window_layers == 1
    model = tiny(SmolLM3Config, no_rope_layers=[1, 0, 1, 1, 0, 0])
    keep_layers(model, [1, 2, 5])
    assert model.config.no_rope_layers == [0, 1, 0]


def test_a_list_of_tokens_that_is_as_long_as_the_model_is_deep_stays() -> None:
    model = tiny(LlamaConfig, eos_token_id=[1, 2, 3, 4, 5, 6])
    keep_layers(model, [0, 5])
    assert model.config.eos_token_id == [1, 2, 3, 4, 5, 6]


def test_a_model_of_fewer_layers_generates_the_same_with_and_without_its_cache() -> None:
    model = tiny(LlamaConfig, eos_token_id=None)
    keep_layers(model, [0, 2, 5])
    answers = [
        model.generate(TOKENS, do_sample=False, max_new_tokens=8, use_cache=cached)  # type: ignore[operator]
        for cached in (True, False)
    ]
    assert torch.equal(*answers)


def test_a_model_that_is_being_trained_can_lose_layers() -> None:
    model = tiny(LlamaConfig)
    model.train()
    model.activation_checkpointing_enable()
    keep_layers(model, [0, 5])
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert len(model.base_model.layers) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [[0, 6], [-1, 2], [2, 0], [1, 1]])
def test_layers_that_do_not_exist_or_are_out_of_order_are_refused(layers: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"rising order, each from 0 to 5, got \["):
        keep_layers(tiny(LlamaConfig), layers)


def test_an_architecture_without_a_list_of_layers_is_named() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))
    with pytest.raises(ModelError, match="GPT2LMHeadModel does not keep its layers in a list"):
        keep_layers(model, [0])


def test_a_config_that_cannot_describe_the_layers_is_found_at_once() -> None:
    """Here it says by number which layers have experts, and the numbers change."""
    model = tiny(Qwen3MoeConfig, mlp_only_layers=[1], num_experts=2, moe_intermediate_size=16, head_dim=8)
    with pytest.raises(ModelError, match="Qwen3MoeForCausalLM cannot describe a model of these layers"):
        keep_layers(model, [0, 2, 3])


@pytest.mark.parametrize(
    ("count", "num_layers", "expected"),
    [(6, 30, [0, 6, 12, 17, 23, 29]), (2, 30, [0, 29]), (1, 30, [0]), (4, 4, [0, 1, 2, 3]), (3, 4, [0, 2, 3])],
)
def test_spread_keeps_the_ends_and_even_distances(count: int, num_layers: int, expected: list[int]) -> None:
    assert choose_layers("spread", count, num_layers) == expected


def test_spread_never_names_a_layer_twice() -> None:
    for num_layers in range(2, 50):
        for count in range(2, num_layers + 1):
            layers = choose_layers("spread", count, num_layers)
            assert layers == sorted(set(layers))
            assert (len(layers), layers[0], layers[-1]) == (count, 0, num_layers - 1)


def test_first_and_last() -> None:
    assert choose_layers("first", 2, 5) == [0, 1]
    assert choose_layers("last", 2, 5) == [3, 4]


def test_important_layers_are_in_the_models_order_and_ties_go_to_the_first() -> None:
    assert important_layers(3, [0.2, 0.9, 0.1, 0.2, 0.2, 0.5]) == [0, 1, 5]


def test_influence_is_one_minus_the_cosine_of_what_goes_in_and_what_comes_out() -> None:
    model = tiny(LlamaConfig)
    silence(model, 2)
    calibration = batch(7, 7)
    with torch.no_grad():
        seen = model.base_model(input_ids=calibration.input_ids, output_hidden_states=True).hidden_states
    expected = [
        1 - torch.nn.functional.cosine_similarity(seen[number], seen[number + 1], dim=-1).mean().item()
        for number in range(5)  # behind the last layer, transformers shows what the final norm makes of it
    ]
    influence = block_influence(model, [calibration])
    assert influence[:5] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert influence[2] == pytest.approx(0.0, abs=1e-9)
    assert important_layers(5, influence) == [0, 1, 3, 4, 5]


def test_padding_does_not_count_and_neither_does_how_rows_lie_in_batches() -> None:
    model = tiny(LlamaConfig)
    padded = block_influence(model, [batch(9, 3)])
    packed = block_influence(model, [batch(9, 3, packed=True)])
    assert padded == pytest.approx(packed, rel=1e-3)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny(LlamaConfig)
    model.train()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    block_influence(model, [batch(5)])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_nothing_to_measure_on_is_said() -> None:
    with pytest.raises(DataError, match="no calibration rows"):
        block_influence(tiny(LlamaConfig), [])


def test_weights_that_are_not_finite_are_said() -> None:
    model = tiny(LlamaConfig)
    decoder: Any = model.base_model
    decoder.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        block_influence(model, [batch(5)])


def test_a_difference_in_the_last_digits_chooses_the_same() -> None:
    """Sums in another order, as with another number of threads."""
    assert largest(rounded([0.30000001, 0.3, 0.1]), 1) == largest(rounded([0.3, 0.30000001, 0.1]), 1) == [0]
