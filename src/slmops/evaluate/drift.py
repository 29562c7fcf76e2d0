"""How far a model has moved from the one that it was made from: their next-token distributions on the same tokens.

Perplexity alone does not rank quantizers: errors that cancel in the mean show in the divergence (Dutta et al. 2024,
arXiv:2407.09141, measure answers that flip and KL for the same reason).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slmops.inference.runtime import TokenRuntime
from slmops.progress import log, track
from slmops.records import ChatRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

EncodedRow = tuple[list[int], int]
"""Token ids, and how many of them are the prompt."""

ROWS = 64
"""Positions that are compared at once, in double precision: 25 MB for a vocabulary of 49,152."""


@dataclass
class _Positions:
    """What was found at each position of one kind, in nats."""

    kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    reference_loss: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def summary(self, prefix: str) -> dict[str, float]:
        import numpy as np

        kl = np.array(self.kl)
        return {
            f"{prefix}_positions": len(kl),
            f"{prefix}_kl_mean": float(kl.mean()),
            f"{prefix}_kl_p99": float(np.percentile(kl, 99)),
            f"{prefix}_top1_agreement": float(np.mean(self.agree)),
            f"{prefix}_perplexity": float(np.exp(np.mean(self.loss))),
            f"{prefix}_reference_perplexity": float(np.exp(np.mean(self.reference_loss))),
        }


def comparable(
    reference: TokenRuntime, model: TokenRuntime, records: Sequence[ChatRecord]
) -> tuple[list[EncodedRow], dict[str, int]]:
    """The records that both encode alike and have room for; the others are counted."""
    longest = min(reference.context_length, model.context_length)
    encoded = [reference.encode_row(record) for record in records]
    alike = [row for row, record in zip(encoded, records, strict=True) if model.encode_row(record) == row]
    rows = [(ids, num_prompt) for ids, num_prompt in alike if len(ids) <= longest]
    return rows, {"num_unlike": len(records) - len(alike), "num_too_long": len(alike) - len(rows)}


def measure(reference: TokenRuntime, model: TokenRuntime, records: Sequence[ChatRecord]) -> dict[str, Any]:
    """Divergence of `model` from `reference`, apart for the answers (`answer_…`) and for all before them (`text_…`).

    KL(reference ‖ model) in nats per token, share of positions with the same likeliest token, and both perplexities.
    Rows that the two turn into other tokens, or that are too long for either, are left out and counted; where none is
    left, or a prediction is no number, `not_run` says why.
    """
    answers, text = _Positions(), _Positions()
    rows, left_out = comparable(reference, model, records)
    for ids, num_prompt in track(rows, "evaluate drift", len(rows)):
        _compare(reference.logits(ids[:-1]), model.logits(ids[:-1]), ids, num_prompt, text, answers)
    found: dict[str, Any] = {"num_rows": len(rows), **left_out}
    if not rows:
        longest = min(reference.context_length, model.context_length)
        why = "their tokenizers differ" if left_out["num_unlike"] else f"all rows are longer than {longest} tokens"
        return found | {"not_run": f"no row could be compared: {why}"}
    if not all(map(math.isfinite, answers.kl + text.kl)):
        return found | {"not_run": "what the model or its reference predicts is no number; quantize it otherwise"}
    found |= answers.summary("answer") | (text.summary("text") if text.kl else {})
    log.info(
        "drift on %d rows: KL %.4f nats a token, the same token first at %.1f %%",
        len(rows), found["answer_kl_mean"], 100 * found["answer_top1_agreement"],
    )  # fmt: skip
    return found


def _compare(
    reference: NDArray[Any],
    logits: NDArray[Any],
    ids: Sequence[int],
    num_prompt: int,
    text: _Positions,
    answers: _Positions,
) -> None:
    """Add the positions of one row of `ids`; `reference` and `logits` are [ids - 1, vocabulary]."""
    import numpy as np

    size = min(reference.shape[1], logits.shape[1])  # rows of padding behind the vocabulary are no tokens
    targets = np.array(ids[1:])
    for start in range(0, len(targets), ROWS):
        at = slice(start, min(start + ROWS, len(targets)))
        wanted, found = _log_softmax(reference[at, :size]), _log_softmax(logits[at, :size])
        kl = np.maximum((np.exp(wanted) * (wanted - found)).sum(-1), 0)  # below 0 by rounding only; NaN stays
        agree = wanted.argmax(-1) == found.argmax(-1)
        rows = np.arange(len(kl))
        losses = (-wanted[rows, targets[at]], -found[rows, targets[at]])
        for number in range(len(kl)):
            kind = text if start + number + 1 < num_prompt else answers
            kind.kl.append(float(kl[number]))
            kind.agree.append(bool(agree[number]))
            kind.reference_loss.append(float(losses[0][number]))
            kind.loss.append(float(losses[1][number]))


def _log_softmax(logits: NDArray[Any]) -> NDArray[Any]:
    """[rows, vocabulary] in nats, in double precision."""
    import numpy as np

    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return np.asarray(wide)
