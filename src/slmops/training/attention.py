"""Attention in float32 for training on a CPU.

The backward pass of torch 2.13's fused attention takes seven times as long there in bfloat16 as in float32 (30 layers,
8 rows of 64 tokens, AMX: 450 against 68 ms, a quarter of the whole step).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLOAT32 = "slmops_sdpa_float32"


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' own attention, on float32 copies of its inputs; the result has their type again."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast(query.device.type, enabled=False):
        result, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return result.to(query.dtype), None


AttentionInterface.register(FLOAT32, _attend)
AttentionMaskInterface.register(FLOAT32, sdpa_mask)


@contextmanager
def trainable_attention(model: PreTrainedModel, compute_dtype: torch.dtype) -> Iterator[None]:
    """Have `model` use the attention that is fastest to train with, where transformers' choice is not."""
    chosen = model.config._attn_implementation
    if model.device.type != "cpu" or compute_dtype != torch.bfloat16 or chosen != "sdpa":
        yield
        return
    model.set_attn_implementation(FLOAT32)
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)
