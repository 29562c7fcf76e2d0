"""Batches padded on the left, with the model's own cache: slower than packed rows, and right for any model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from slmops.teachers.choosing import choose, top_k_records
from slmops.teachers.decoding import Request, Row
from slmops.teachers.interface import Decoding
from slmops.training.batches import pad_left


class PaddedDecoder:
    """Answers requests a batch at a time; drafts are not looked at."""

    def __init__(self, model: PreTrainedModel, decoding: Decoding, end_tokens: set[int], max_rows: int) -> None:
        self.model, self.decoding, self.end_tokens, self.max_rows = model, decoding, end_tokens, max_rows

    def decode(self, requests: Sequence[Request]) -> Iterator[Row]:
        """Yield the rows of each batch when the last of them is complete."""
        for start in range(0, len(requests), self.max_rows):
            yield from self._batch([Row(request) for request in requests[start : start + self.max_rows]])

    def _batch(self, rows: list[Row]) -> list[Row]:
        inputs: dict[str, Any] = pad_left([list(row.request.ids) for row in rows], 0, self.model.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        cache: Any = None
        for at in range(max(row.request.max_new_tokens for row in rows)):
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            output: Any = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1]
            chosen = choose(logits, self.decoding, [row.request.seed for row in rows], [at] * len(rows))
            self._take(rows, logits, chosen)
            if all(self._is_complete(row) for row in rows):
                break
            ids = torch.tensor(chosen, device=self.model.device).unsqueeze(1)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        return rows

    def _take(self, rows: list[Row], logits: torch.Tensor, chosen: Sequence[int]) -> None:
        """Add a token to each row that is not complete yet."""
        going_on = [number for number, row in enumerate(rows) if not self._is_complete(row)]
        if self.decoding.logits_top_k:
            kept = top_k_records(logits[going_on], self.decoding.logits_top_k, self.decoding.logits_temperature)
            for number, record in zip(going_on, kept, strict=True):
                rows[number].records.append(record[None])
        for number in going_on:
            rows[number].tokens.append(chosen[number])

    def _is_complete(self, row: Row) -> bool:
        tokens = row.tokens
        return bool(tokens) and (tokens[-1] in self.end_tokens or len(tokens) >= row.request.max_new_tokens)
