"""Continuous batching with drafts: rows come and go one by one, and several tokens of a row are found at once.

A draft is checked, not believed: the model reads it behind the prompt in one pass and chooses a token at each position as
it would have without it; the draft's tokens count up to where the model chose another one (speculative decoding,
Leviathan et al. 2023, for a draft without a distribution). What is found is the same, how fast is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from slmops.teachers.choosing import choose, top_k_records
from slmops.teachers.interface import Decoding
from slmops.teachers.packed import Feed, PackedModel

MAX_TOKENS_AT_ONCE = 2048
"""Tokens of one pass over new prompts: enough for the matrix products, little beside the weights in memory."""
MAX_LOGITS_AT_ONCE = 512
"""Distributions of one pass: 100 MB in float32 at a vocabulary of 49,152."""
FREE_FRACTION = 0.25
"""New rows are read when this share of the slots is free: a pass over few tokens costs as much as one over many."""


@dataclass(frozen=True)
class Request:
    """One prompt, in tokens."""

    number: int
    ids: Sequence[int]
    """The prompt."""
    draft: Sequence[int]
    """An answer to try."""
    seed: int
    max_new_tokens: int


@dataclass
class Row:
    """A request at work."""

    request: Request
    proposed: list[int] = field(default_factory=list)
    """Tokens to try next."""
    tokens: list[int] = field(default_factory=list)
    """The answer so far; its last token is not in the slot yet."""
    records: list[np.ndarray] = field(default_factory=list)
    """[len(tokens)] in pieces."""
    num_read: int = 0
    """Tokens in the slot."""


class Lookup:
    """What followed the last tokens in earlier answers (prompt lookup decoding, Saxena 2023, across prompts).

    A guess is made only where the last `CONFIRMED` answers agreed, because a wrong one costs a token's work.
    """

    SPAN = 4
    CONFIRMED = 2
    MAX_ENTRIES = 200_000

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], tuple[int, int]] = {}

    def learn(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        text = [*prompt[-self.SPAN :], *answer]
        for at in range(max(0, len(text) - len(answer)), len(text)):
            context = tuple(text[max(0, at - self.SPAN) : at])
            token, times = self._next.get(context, (text[at], 0))
            if token == text[at]:
                self._next[context] = (token, times + 1)
            else:
                self._next[context] = (text[at], 1)
        if len(self._next) > self.MAX_ENTRIES:
            self._next = {context: found for context, found in self._next.items() if found[1] > 1}
            if len(self._next) > self.MAX_ENTRIES // 2:
                self._next.clear()

    def guess(self, text: Sequence[int], limit: int) -> list[int]:
        """Up to `limit` tokens that are likely to follow."""
        context, guessed = tuple(text[-self.SPAN :]), []
        while len(guessed) < limit:
            token, times = self._next.get(context, (-1, 0))
            if times < self.CONFIRMED:
                break
            guessed.append(token)
            context = (*context[1:], token)
        return guessed


class Decoder:
    """Answers requests with a packed model."""

    MAX_GUESS = 8

    def __init__(self, model: PackedModel, decoding: Decoding, end_tokens: set[int], max_rows: int) -> None:
        self.model, self.decoding, self.end_tokens, self.max_rows = model, decoding, end_tokens, max_rows
        self.lookup = Lookup()
        self.rows: list[Row] = []
        """Row r is in slot r."""

    def decode(self, requests: Iterator[Request]) -> Iterator[Row]:
        """Yield rows as their answers are complete; takes requests as slots get free."""
        waiting: list[Request] = []
        while True:
            free = self.max_rows - len(self.rows) - len(waiting)
            if not self.rows or free >= FREE_FRACTION * self.max_rows:
                waiting += islice(requests, free)
            if waiting:
                yield from self._read(waiting)
            elif self.rows:
                yield from self._step()
            else:
                return

    def _read(self, waiting: list[Request]) -> Iterator[Row]:
        """Read the first of the waiting prompts with their drafts, as many as one pass takes."""
        rows, feeds, num_tokens, num_logits = [], [], 0, 0
        while waiting:
            request = waiting[0]
            draft = list(request.draft) or self.lookup.guess(request.ids, self.MAX_GUESS)
            draft = draft[: request.max_new_tokens - 1]
            num_tokens += len(request.ids) + len(draft)
            num_logits += len(draft) + 1
            if rows and (num_tokens > MAX_TOKENS_AT_ONCE or num_logits > MAX_LOGITS_AT_ONCE):
                break
            rows.append(Row(waiting.pop(0), proposed=draft))
            feeds.append(Feed(0, [*request.ids, *draft], len(draft) + 1))
        first = len(self.rows)
        logits, which = self.model.forward(first, feeds, share=True)
        for row in rows:
            row.num_read = len(row.request.ids) - 1
        self.rows += rows
        yield from self._take(first, rows, logits, which)

    def _step(self) -> Iterator[Row]:
        """Read every row's last token, and what is guessed to follow."""
        feeds = []
        for row in self.rows:
            limit = min(self.MAX_GUESS, row.request.max_new_tokens - len(row.tokens) - 1)
            row.proposed = self._propose(row)[: max(limit, 0)]
            feeds.append(Feed(row.num_read, [row.tokens[-1], *row.proposed], len(row.proposed) + 1))
        logits, which = self.model.forward(0, feeds)
        yield from self._take(0, list(self.rows), logits, which)

    def _propose(self, row: Row) -> list[int]:
        return self.lookup.guess([*row.request.ids[-Lookup.SPAN :], *row.tokens], self.MAX_GUESS)

    def _take(self, first: int, rows: list[Row], logits: torch.Tensor, which: np.ndarray) -> Iterator[Row]:
        """Keep of each row's proposed tokens what the model chose as well, and the token behind them."""
        counts = [len(row.proposed) + 1 for row in rows]
        if self.decoding.greedy:
            chosen = np.array(choose(logits, self.decoding, (), ()))[which].tolist()
        else:
            places = torch.as_tensor(which, device=logits.device)
            seeds = [row.request.seed for row, count in zip(rows, counts, strict=True) for _ in range(count)]
            positions = [len(row.tokens) + at for row, n in zip(rows, counts, strict=True) for at in range(n)]
            chosen = choose(logits[places], self.decoding, seeds, positions)
        kept: list[int] = []
        at = 0
        sizes = []
        for row, count in zip(rows, counts, strict=True):
            size = 1
            while chosen[at + size - 1] not in self.end_tokens and size < count and (
                chosen[at + size - 1] == row.proposed[size - 1]
            ):
                size += 1
            row.tokens += chosen[at : at + size]
            row.num_read += size
            kept += range(at, at + size)
            sizes.append(size)
            at += count
        if self.decoding.logits_top_k:
            places = torch.as_tensor(which[kept], device=logits.device)
            records = top_k_records(logits[places], self.decoding.logits_top_k, self.decoding.logits_temperature)
            for row, piece in zip(rows, np.split(records, np.cumsum(sizes)[:-1]), strict=True):
                row.records.append(piece)
        done = [slot for slot, row in enumerate(rows, first) if self._is_complete(row)]
        finished = [self.rows[slot] for slot in done]
        self._leave(done)
        for row in finished:
            self.lookup.learn(row.request.ids, row.tokens)
        yield from finished

    def _is_complete(self, row: Row) -> bool:
        return row.tokens[-1] in self.end_tokens or len(row.tokens) >= row.request.max_new_tokens

    def _leave(self, done: Sequence[int]) -> None:
        """Close the gaps with the last rows, so that rows at work stay neighbours."""
        kept = len(self.rows) - len(done)
        gone = set(done)
        targets = [slot for slot in done if slot < kept]
        sources = [slot for slot in range(kept, len(self.rows)) if slot not in gone]
        self.model.slots.move(sources, targets, max((self.rows[slot].num_read for slot in sources), default=0))
        for source, target in zip(sources, targets, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[kept:]
