"""Losses in tiles are those of full logits, with the same gradients, and no tensor is larger than it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedModel

from slmops import torch_models
from slmops.errors import ModelError
from slmops.training import head as heads
from slmops.training.batches import Batch, Row, collate
from slmops.training.head import SparseHead, labels_loss

CPU = torch.device("cpu")
ROWS = [
    Row(0, [5, 6, 7, 8, 9, 10], [3, 4, 5]),
    Row(1, [11, 12, 13], [1, 2]),
    Row(2, [7, 7, 8, 9, 14, 15, 16, 17], [4, 5, 6, 7]),
]


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return torch_models.load_model(tiny_model, dtype=torch.float32, device=CPU)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of two positions, blocks of one."""
    monkeypatch.setattr(heads, "TILE_BYTES", {"cpu": 8 * 1024})
    monkeypatch.setattr(heads, "BLOCK_ELEMENTS", {"cpu": 1024})


def full_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Cross-entropy by the model's own forward pass."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return F.cross_entropy(logits.flatten(0, 1)[batch.predict_from].float(), batch.target_ids, reduction="sum")


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("how", ["padded", "packed", "shared prefix"])
def test_loss_and_gradients_are_those_of_full_logits(model: PreTrainedModel, how: str) -> None:
    rows = [Row(row.index, [3, 4, 5, 6, 7, *row.input_ids], [at + 5 for at in row.targets]) for row in ROWS]
    batch = collate(rows, 0, CPU, packed=how == "packed", shared_prefix=how == "shared prefix")
    assert (batch.prefix_ids is not None) == (how == "shared prefix")
    head = SparseHead(model)
    assert head.shares_prefix()
    loss = head.loss(head.hidden(batch), labels_loss(batch))
    expected = full_loss(model, collate(rows, 0, CPU))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = gradients(model, loss / 3), gradients(model, expected / 3)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5)


def test_packed_rows_do_not_see_each_other(model: PreTrainedModel) -> None:
    """Each row's loss is what it is alone, whatever stands before it."""
    head = SparseHead(model.eval())
    alone = []
    for row in ROWS:
        batch = collate([row], 0, CPU)
        alone.append(head.loss(head.hidden(batch), labels_loss(batch)).item())
    together = collate(ROWS, 0, CPU, packed=True)
    assert together.input_ids.shape == (1, sum(len(row.input_ids) for row in ROWS))
    found = F.cross_entropy(head.logits(together), together.target_ids, reduction="none")
    per_row = [part.sum().item() for part in found.split([len(row.targets) for row in ROWS])]
    assert per_row == pytest.approx(alone, rel=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_a_head_with_a_bias_that_is_frozen_or_not(model: PreTrainedModel) -> None:
    head = SparseHead(model)
    head.head = torch.nn.Linear(head.head.in_features, head.head.out_features)
    hidden = torch.randn(7, head.head.in_features, requires_grad=True)
    targets = torch.arange(7)

    def tile(at: slice) -> Any:
        return lambda logits, rows: F.cross_entropy(logits, targets[at][rows], reduction="sum")

    expected = F.cross_entropy(head.head(hidden), targets, reduction="sum")
    wanted = torch.autograd.grad(expected, [hidden, head.head.weight, head.head.bias])
    found = torch.autograd.grad(head.loss(hidden, tile), [hidden, head.head.weight, head.head.bias])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    head.head.requires_grad_(False)
    (of_hidden,) = torch.autograd.grad(head.loss(hidden, tile), [hidden])
    torch.testing.assert_close(of_hidden, wanted[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (Gemma2Config(final_logit_softcapping=3.0, head_dim=8), Gemma2ForCausalLM),
        (GraniteConfig(logits_scaling=4.0), GraniteForCausalLM),
    ],
    ids=["capped", "scaled"],
)
def test_logits_that_an_architecture_caps_or_scales(config: Any, architecture: Any) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    for name, value in (small | {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}).items():
        setattr(config, name, value)
    config.layer_types = ["full_attention"]
    torch.manual_seed(0)
    model = architecture(config).eval()
    model.get_output_embeddings().weight.data.mul_(50.0)
    head, batch = SparseHead(model), collate(ROWS, 0, CPU)
    loss = head.loss(head.hidden(batch), labels_loss(batch))
    expected = full_loss(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, gradient in gradients(model, loss).items():
        assert torch.isfinite(gradient).all(), name


def test_a_model_whose_logits_are_made_in_an_unknown_way_is_refused(model: PreTrainedModel) -> None:
    forward = model.forward

    def other(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        output.logits = output.logits * 2 + 1
        return output

    model.forward = other
    with pytest.raises(ModelError, match="computes its logits in a way that slmops does not know"):
        SparseHead(model)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that anything inside it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("vocabulary", [4096, 16384, 65536])
def test_the_largest_tensor_does_not_grow_with_positions_or_vocabulary(
    vocabulary: int, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "TILE_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(heads, "BLOCK_ELEMENTS", {"cpu": 1 << 17})
    head = SparseHead(model)
    head.head = torch.nn.Linear(4, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(512, 4, requires_grad=True)
    targets = torch.arange(512)
    with Largest() as largest:
        head.loss(hidden, lambda at: lambda logits, rows: F.cross_entropy(logits, targets[at][rows])).backward()
    assert 1 << 17 <= largest.elements <= 1 << 18
