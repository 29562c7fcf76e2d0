"""The next token by its logits, as a model's own search settings or a request's say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.inference.slots import NoSlotsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CANDIDATES = 256
"""Likeliest tokens that are sorted first: they nearly always hold top_p of the probability."""
NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
"""Settings of genai_config.json that are not served in a batch, and the values that ask for nothing."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = 0
    """Of so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Of the fewest likeliest tokens that hold this share of the probability (Holtzman et al. 2020)."""

    def choose(self, logits: NDArray[Any], generator: np.random.Generator) -> int:
        """A token by its `logits` [vocabulary]."""
        if not self.temperature or self.top_k == 1:
            return int(logits.argmax())
        scaled = (logits - logits.max()) / np.float32(self.temperature)
        weights = np.exp(scaled, dtype=np.float64)
        tokens = self._allowed(weights)
        sums = np.cumsum(weights if tokens is None else weights[tokens])
        drawn = min(int(np.searchsorted(sums, generator.random() * sums[-1], side="right")), len(sums) - 1)
        return drawn if tokens is None else int(tokens[drawn])

    def _allowed(self, weights: NDArray[Any]) -> NDArray[Any] | None:
        """Tokens that may be drawn, likeliest first; None for all."""
        tokens = None
        if 0 < self.top_k < len(weights):
            tokens = _likeliest(weights, self.top_k)
        if self.top_p < 1:
            total = weights.sum() if tokens is None else weights[tokens].sum()
            if tokens is None:
                tokens = _likeliest(weights, min(CANDIDATES, len(weights)))
                if weights[tokens].sum() < self.top_p * total:
                    tokens = _likeliest(weights, len(weights))
            enough = int(np.searchsorted(np.cumsum(weights[tokens]), self.top_p * total)) + 1
            tokens = tokens[:enough]
        return tokens


def of_search(search: Mapping[str, Any]) -> Sampling:
    """A model's own, by the `search` of its genai_config.json.

    Raises:
        NoSlotsError: it asks for what is not served in a batch.
    """
    for name, neutral in NEUTRAL.items():
        if search.get(name, neutral) != neutral:
            raise NoSlotsError(f"its own {name} is {search[name]}")
    if not search.get("do_sample", False):
        return Sampling()
    return Sampling(
        float(search.get("temperature", 1.0)), int(search.get("top_k", 50)), float(search.get("top_p", 1.0))
    )


def _likeliest(weights: NDArray[Any], count: int) -> NDArray[Any]:
    """Indices of the `count` largest, largest first."""
    found = np.argpartition(weights, len(weights) - count)[len(weights) - count :] if count < len(weights) else None
    found = np.arange(len(weights)) if found is None else found
    return found[np.argsort(-weights[found], kind="stable")]
