"""Training's own attention gives transformers' results, and leaves no trace in the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from slmops.torch_models import load_model, save_model
from slmops.training.attention import FLOAT32, trainable_attention

CPU = torch.device("cpu")


def gradients(model: torch.nn.Module, padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0 if padded else 1
    model.zero_grad()
    hidden = model(input_ids=ids, attention_mask=mask).logits.float()
    (hidden * mask[:, :, None]).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_closer_to_float32_than_those_of_the_fused_kernel(tiny_model: Path, padded: bool) -> None:
    exact = gradients(load_model(tiny_model, dtype=torch.float32, device=CPU), padded)
    model = load_model(tiny_model, dtype=torch.bfloat16, device=CPU)
    fused = gradients(model, padded)
    with trainable_attention(model, torch.bfloat16):
        assert model.config._attn_implementation == FLOAT32
        ours = gradients(model, padded)

    def distance(found: dict[str, torch.Tensor]) -> float:
        return sum(float((found[name].float() - exact[name]).square().sum()) for name in exact)

    norm = sum(float(gradient.square().sum()) for gradient in exact.values())
    assert distance(ours) < 1e-2 * norm
    assert distance(ours) < 1.2 * distance(fused)


def test_only_bfloat16_on_a_cpu_is_changed_and_nothing_is_saved_of_it(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model, dtype=torch.float32, device=CPU)
    with trainable_attention(model, torch.float32):
        assert model.config._attn_implementation == "sdpa"
    with trainable_attention(model, torch.bfloat16):
        save_model(model, AutoTokenizer.from_pretrained(tiny_model), tmp_path)
    assert model.config._attn_implementation == "sdpa"
    assert FLOAT32 not in (tmp_path / "config.json").read_text()
