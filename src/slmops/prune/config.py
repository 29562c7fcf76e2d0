"""Settings of prune."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slmops.config import Config


class PruneConfig(Config):
    """A model with fewer layers, less width, zeros among its weights, or only the tokens that a domain uses."""

    shape: dict[str, int] = Field(default={})
    """Sizes by their names in config.json: num_hidden_layers, intermediate_size, num_attention_heads, ..."""
    layer_rule: Literal["spread", "first", "last", "importance"] = "importance"
    """Which layers stay where there are fewer: even distances, the first, the last, or those that change most."""
    keep_layers: list[int] = Field(default=[])
    """Layers to keep by hand instead, counted from 0, in rising order; empty leaves it to `layer_rule`."""
    sparsity: Literal["none", "2:4", "unstructured"] = "none"
    """Zeros among the weights of all layers: two of each four in a row, or anywhere; no size or speed by itself."""
    sparsity_fraction: float = Field(default=0.5, gt=0, lt=1)
    """Share of zeros for `unstructured`, 0 to 1; `2:4` has half."""
    vocabulary: Literal["kept", "domain"] = "kept"
    """`domain`: tokens that the calibration rows do not use leave the embedding, the head and the tokenizer."""
    min_vocab_size: int = Field(default=4096, ge=0, le=1_000_000)
    """Least number of tokens to keep with `domain`, 0 for no more than needed; filled up with the most common ones."""
    vocab_multiple: int = Field(default=64, ge=1, le=1024)
    """The number of tokens is a multiple of this, for matrix kernels that work in blocks."""
    max_calibration_rows: int = Field(default=256, ge=1, le=100_000)
    """Rows on which importance is measured and zeros are chosen; the vocabulary is that of all rows."""
    max_length: int = Field(default=512, ge=1, le=131_072)
    """Longer rows are left out where importance is measured, in tokens."""
    micro_batch_size: int = Field(default=16, ge=1, le=1024)
    """Rows that go through the model at once."""

    @property
    def cuts(self) -> bool:
        """Whether anything is to be cut."""
        return bool(self.shape or self.keep_layers) or self.sparsity != "none" or self.vocabulary != "kept"
