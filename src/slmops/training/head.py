"""The language model's head, computed only where there is loss, and in tiles, so that full logits are never held.

Most of a small model's work is its vocabulary. A tile holds the logits of as many positions as fit into a fixed size,
in the compute type; the loss and its gradient are found in it block by block, in float32, while the block is in the
processor's cache. The gradient takes the place of the logits, and two matrix products hand it on. So what the loss
needs in memory depends neither on the number of positions nor on the size of the vocabulary (docs/adr/0024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from slmops.errors import ModelError
from slmops.training.batches import Batch, Row, collate
from slmops.training.losses import cross_entropy

PROBE = (Row(0, [5, 6, 7, 8, 9, 10, 11], [6]), Row(1, [5, 6, 7, 8, 12, 6, 13, 8], [6, 7]))
"""Rows that begin alike, by which a model is tried."""

BlockLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""Sum of the loss over a block of b positions, given float32 logits [b, V] and where in the tile the block is."""
TileLoss = Callable[[slice], BlockLoss]
"""What a tile needs, such as a teacher's logits, made once for the tile; given where in the N positions it is."""

TILE_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Logits of one tile, in the compute type: enough positions for the matrix products."""
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Logits of one block: 4 MB in float32, which a CPU's cache holds. A GPU would only launch more kernels."""


class SparseHead:
    """Logits at chosen positions of a causal language model, and losses of them.

    Takes the model apart into decoder and head, and scales or caps logits as the model's config says. Whether that is
    all is found out once, by comparing with the model's own logits.

    Raises:
        ModelError: it is not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config.get_text_config()
        self.decoder = model.base_model
        self.head = model.get_output_embeddings()
        self.finish = _finish(model)
        probe = torch.arange(8, device=self.head.weight.device).unsqueeze(0)
        with torch.no_grad():
            whole = model(input_ids=probe, use_cache=False).logits[0].float()
            hidden = self.decoder(input_ids=probe, use_cache=False).last_hidden_state
            parts = self.finish(self.head(hidden)[0].float())
        if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise ModelError(
                f"{type(model).__name__} computes its logits in a way that slmops does not know, so it cannot be "
                "trained; use another student"
            )

    @torch.no_grad()
    def shares_prefix(self) -> bool:
        """Whether the decoder gives the same for rows whose common beginning it reads once, as attention does."""
        device, training = self.head.weight.device, self.decoder.training
        self.decoder.eval()
        try:
            found = [self.hidden(collate(PROBE, 0, device, shared_prefix=shared)) for shared in (False, True)]
        except (TypeError, AttributeError, ValueError, RuntimeError):  # a cache of another kind
            return False
        finally:
            self.decoder.train(training)
        return torch.allclose(found[0].float(), found[1].float(), rtol=5e-2, atol=5e-2)

    def decode(self, batch: Batch, **options: Any) -> Any:
        """The decoder's output for `batch`; `options` ask for more, such as `output_hidden_states`."""
        if batch.prefix_ids is None or batch.attention_mask is None:
            return self.decoder(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
                **options,
            )
        # Causal attention: what all rows begin with has the same keys and values in each, and gradients add up in them.
        cache = DynamicCache(config=self.config)
        self.decoder(input_ids=batch.prefix_ids, past_key_values=cache, use_cache=True)
        start, length = batch.prefix_ids.shape[1], batch.input_ids.shape[1]
        cache.batch_repeat_interleave(len(batch.input_ids))
        return self.decoder(
            input_ids=batch.input_ids,
            attention_mask=F.pad(batch.attention_mask, (start, 0), value=1),
            position_ids=torch.arange(start, start + length, device=batch.input_ids.device).unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
            **options,
        )

    def hidden(self, batch: Batch) -> torch.Tensor:
        """[N, d] hidden states from which `batch.target_ids` are predicted."""
        return at_targets(self.decode(batch).last_hidden_state, batch)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[N, V] logits that predict `batch.target_ids`, in float32."""
        return self.finish(self.head(self.hidden(batch)).float())

    def tile(self, hidden: torch.Tensor) -> BlockLogits:
        """Logits of [n, d] hidden states, for the blocks of one tile."""
        logits = self.head(hidden)
        return lambda rows: self.finish(logits[rows].float())

    def loss(self, hidden: torch.Tensor, tile_loss: TileLoss) -> torch.Tensor:
        """The sum of a loss over N positions, with its gradient where gradients are on.

        Args:
            hidden: [N, d].
            tile_loss: the loss; called for one tile after the other.
        """
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)

        def block_losses(at: slice) -> BlockLoss:
            of_block = tile_loss(at)
            return lambda logits, rows: of_block(self.finish(logits), rows)

        total: torch.Tensor = _TiledLoss.apply(hidden, weight, bias, block_losses, wanted)
        return total


BlockLogits = Callable[[slice], torch.Tensor]
"""Float32 logits [b, V] of a block, given where in its tile it is."""


def at_targets(hidden_states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[N, d] of [B, L, d]: the positions from which a target is predicted."""
    return hidden_states.flatten(0, 1)[batch.predict_from]


def loss_on_labels(head: SparseHead, batch: Batch) -> torch.Tensor:
    """The sum of cross-entropy on the batch's own tokens: the whole loss of a training without a teacher."""
    return head.loss(head.hidden(batch), labels_loss(batch))


def labels_loss(batch: Batch) -> TileLoss:
    """Cross-entropy on the batch's own tokens."""

    def tile(at: slice) -> BlockLoss:
        targets = batch.target_ids[at]
        return lambda logits, rows: cross_entropy(logits, targets[rows])

    return tile


def _finish(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the architecture does with the head's product: Granite divides, Cohere multiplies, Gemma caps."""
    config = model.config.get_text_config()
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def finish(logits: torch.Tensor) -> torch.Tensor:
        if factor != 1.0:
            logits = logits * factor
        return torch.tanh(logits / cap) * cap if cap else logits

    return finish


class _TiledLoss(torch.autograd.Function):
    """A loss of logits that are never all there; its gradient is found with it, while they are at hand.

    This is how Liger's fused losses work (Hsu et al. 2024, arXiv:2410.10989), with any loss in the middle.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tile_loss: TileLoss,
        wanted: bool,
    ) -> torch.Tensor:
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        total = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if wanted and ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if wanted and ctx.needs_input_grad[1] else None
        bias_gradient = torch.zeros_like(bias) if wanted and bias is not None and ctx.needs_input_grad[2] else None
        for at in _slices(len(hidden), TILE_BYTES[kind] // (weight.itemsize * len(weight))):
            logits = F.linear(hidden[at], weight, bias)
            with torch.autocast(kind, enabled=False):
                total += _replace_by_gradient(logits, tile_loss(at), wanted, BLOCK_ELEMENTS[kind] // len(weight))
            if hidden_gradient is not None:
                torch.mm(logits, weight, out=hidden_gradient[at])
            if weight_gradient is not None:
                _add_product(weight_gradient, logits.T, hidden[at])
            if bias_gradient is not None:
                bias_gradient += logits.sum(0)
        ctx.gradients = hidden_gradient, weight_gradient, bias_gradient
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if scale.device.type != "cpu" or scale != 1:  # a GPU would have to be waited for to know
            for gradient in ctx.gradients:
                if gradient is not None:
                    gradient.mul_(scale)
        found = ctx.gradients
        del ctx.gradients  # so that the parameter's gradient can be this very tensor
        return (*found, None, None)


def _add_product(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """Add the product of two matrices to `total`, in place where the types are one."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total += one @ other


def _replace_by_gradient(logits: torch.Tensor, block_loss: BlockLoss, wanted: bool, rows_at_once: int) -> torch.Tensor:
    """The loss of one tile of `logits` [n, V]; with `wanted`, they become the gradient with respect to them."""
    total = torch.zeros((), device=logits.device)
    for rows in _slices(len(logits), rows_at_once):
        block = logits[rows].float().detach().requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            loss = block_loss(block, rows)
        if wanted:
            (gradient,) = torch.autograd.grad(loss, block)
            logits[rows] = gradient
        total += loss.detach()
    return total


def _slices(length: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
