"""Activation-aware scales leave the model the same function, and its rounded weights a better one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from slmops.errors import ModelError
from slmops.quantize import awq
from slmops.quantize.checkpoint import rounded

SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CONFIGS = [
    LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    LlamaConfig(**SIZES, num_key_value_heads=4),
    MistralConfig(**SIZES, num_key_value_heads=1),
    Qwen2Config(**SIZES, num_key_value_heads=2),
    Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32),
    SmolLM3Config(**SIZES, num_key_value_heads=2),
    Phi3Config(**SIZES, num_key_value_heads=2),
]


def make(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with a few channels that are much larger than the rest, as trained ones have."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
                parameter[:4] *= 10
            else:
                parameter.normal_(0, 0.04)
    return model


def batches() -> list[torch.Tensor]:
    return [torch.randint(3, 256, (4, length), generator=torch.Generator().manual_seed(length)) for length in (9, 14)]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([model(input_ids=ids).logits.flatten(0, 1) for ids in batches()])


@torch.no_grad()
def round_layers(model: PreTrainedModel) -> None:
    layers: Any = model.base_model.layers
    for module in layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data, 4, 32)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.model_type}-{config.num_key_value_heads}")
def test_the_function_stays_and_rounding_harms_it_less(config: PreTrainedConfig) -> None:
    model, plain = make(config), make(config)
    wanted = logits(model)
    num_places = len(list(awq.places(model)))
    assert num_places == 4 * config.num_hidden_layers
    assert 0 < awq.scale(model, batches(), bits=4, block_size=32) <= num_places
    assert torch.allclose(logits(model), wanted, atol=1e-3, rtol=1e-3)
    errors = []
    for each in (plain, model):
        round_layers(each)
        errors.append((logits(each) - wanted).square().mean().item())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("num_tokens", [7, 50])
def test_no_token_of_a_row_is_looked_at_more_often_than_others(num_tokens: int) -> None:
    """The first one's activations are unlike all others'; rows are of one length, which a fixed step would meet."""
    model = make(LlamaConfig(**SIZES, num_key_value_heads=2))
    ids = torch.full((100, num_tokens), 5)
    ids[:, 0] = 3
    embedding: Any = model.get_input_embeddings()
    embedding.weight.data[3] = -embedding.weight.data[5]  # by its sign it is known behind the norm
    reader = next(awq.places(model)).readers[0]
    (seen,) = awq._observe(model, list(ids.split(2)), [reader]).values()
    others = seen @ seen[-1] > 0
    assert len(seen) == awq.MAX_TOKENS
    share = min(others.float().mean().item(), 1 - others.float().mean().item())
    assert share == pytest.approx(1 / num_tokens, rel=0.5)


def test_layers_that_are_not_known_are_left_alone() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=256, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="how the layers of a gpt2 model fit together is not known here"):
        awq.scale(model, batches(), bits=4, block_size=32)
