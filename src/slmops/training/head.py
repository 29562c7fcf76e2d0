"""The language model's head, computed only where it is wanted: most of a small model's work is its vocabulary."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from slmops.errors import ModelError
from slmops.training.batches import Batch


class SparseHead:
    """Logits at chosen positions of a causal language model.

    Takes the model apart into decoder and head. Some architectures do more behind the decoder than one matrix product
    (scaled or capped logits); that is found out once, by comparing with the model's own logits.

    Raises:
        ModelError: the two differ.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.decoder = model.base_model
        self.head = model.get_output_embeddings()
        probe = torch.arange(8, device=self.head.weight.device).unsqueeze(0)
        with torch.no_grad():
            whole = model(input_ids=probe, use_cache=False).logits[0].float()
            parts = self.head(self.decoder(input_ids=probe, use_cache=False).last_hidden_state)[0].float()
        if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise ModelError(
                f"{type(model).__name__} computes its logits by more than a matrix product, which slmops does not "
                "train yet; use another student"
            )

    def logits(self, batch: Batch) -> torch.Tensor:
        """[N, V] logits that predict `batch.target_ids`, in float32."""
        hidden = self.decoder(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        logits: torch.Tensor = self.head(hidden.flatten(0, 1)[batch.predict_from]).float()
        return logits
