"""Continuous batching with drafts: rows come and go one by one, and several tokens of a row are found at once.

A draft is checked, not believed: the model reads it behind the prompt in one pass and chooses a token at each position
as it would have without it; the draft's tokens count up to where the model chose another one (speculative decoding,
Leviathan et al. 2023, for a draft without a distribution). What is found is the same, how fast is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

import numpy as np
import torch

from slmops import hardware
from slmops.progress import log
from slmops.teachers.choosing import choose, top_k_records
from slmops.teachers.interface import Decoding
from slmops.teachers.packed import Feed, PackedModel

MAX_TOKENS_AT_ONCE = 2048
"""Tokens of one pass over new prompts: enough for the matrix products, little beside the weights in memory."""
MAX_LOGITS_AT_ONCE = 512
"""Distributions of one pass: 100 MB in float32 at a vocabulary of 49,152."""
MIN_PREFIX = 32
"""Common tokens of prompts that are worth keeping; fewer are read again with each pass."""
MIN_SHARING = 4
"""Prompts for which they are kept."""
FEWER_AT_ONCE = "memory ran out; %d prompts at once from now on"
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
        context = tuple(text[-self.SPAN :])
        guessed: list[int] = []
        while len(guessed) < limit:
            token, times = self._next.get(context, (-1, 0))
            if times < self.CONFIRMED:
                break
            guessed.append(token)
            context = (*context[1:], token)
        return guessed


def _common(rows: Iterable[Sequence[int]]) -> int:
    """How many first tokens all rows have in common."""
    columns = zip(*rows, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _room(request: Request) -> int:
    """Tokens that a request may take in its slot."""
    return len(request.ids) + request.max_new_tokens


class Decoder:
    """Answers requests with a packed model."""

    MAX_GUESS = 8

    def __init__(
        self, model: PackedModel, decoding: Decoding, end_tokens: set[int], *, max_rows: int, memory_bytes: int
    ) -> None:
        """`memory_bytes` is what keys and values may take: of long rows, fewer are worked on at once."""
        self.model, self.decoding, self.end_tokens = model, decoding, end_tokens
        self.max_rows, self.memory_bytes = max_rows, memory_bytes
        self.lookup = Lookup()
        self.rows: list[Row] = []
        """Row r is in slot r."""
        self._prefix: list[int] = []
        self._prefix_slot: torch.Tensor | None = None

    def decode(self, requests: Iterator[Request]) -> Iterator[Row]:
        """Yield rows as their answers are complete; takes requests as slots get free.

        Where memory runs out, the rows at work begin again, half as many at once.

        Raises:
            RuntimeError: memory does not suffice for one row.
        """
        waiting: list[Request] = []
        while True:
            free = self.max_rows - len(self.rows) - len(waiting)
            if not self.rows or free >= FREE_FRACTION * self.max_rows:
                waiting += islice(requests, max(free, 0))
            try:
                if waiting and self._fits(waiting[0]):
                    finished = self._read(waiting)
                elif self.rows:
                    finished = self._step()
                else:
                    return
            except RuntimeError as error:
                if not hardware.is_out_of_memory(error) or self.max_rows == 1:
                    raise
                waiting = [row.request for row in self.rows] + waiting
                self._halve()
                continue
            yield from finished

    def _fits(self, request: Request) -> bool:
        """Whether memory has room for one more row. The only row always has: its memory cannot be less."""
        longest = max(_room(request) for request in [request, *(row.request for row in self.rows)])
        need = (len(self.rows) + 1) * longest * self.model.slots.bytes_per_token
        return not self.rows or (len(self.rows) < self.max_rows and need <= self.memory_bytes)

    def _halve(self) -> None:
        self.max_rows = max(1, self.max_rows // 2)
        log.info(FEWER_AT_ONCE, self.max_rows)
        self.rows.clear()
        self._prefix, self._prefix_slot = [], None
        self.model.slots.clear()

    @torch.inference_mode()
    def _read(self, waiting: list[Request]) -> list[Row]:
        """Read the first of the waiting prompts with their drafts, as many as one pass takes."""
        first = len(self.rows)
        start = self._use_prefix(waiting)
        rows: list[Row] = []
        feeds: list[Feed] = []
        num_logits = longest = 0
        while waiting and (not rows or self._fits(waiting[0])):
            request = waiting[0]
            draft = list(request.draft) or self.lookup.guess(request.ids, self.MAX_GUESS)
            draft = draft[: request.max_new_tokens - 1]
            length = len(request.ids) - start + len(draft)
            longest, num_logits = max(longest, length), num_logits + len(draft) + 1
            if rows and (longest * (len(rows) + 1) > MAX_TOKENS_AT_ONCE or num_logits > MAX_LOGITS_AT_ONCE):
                break
            rows.append(Row(waiting.pop(0), proposed=draft, num_read=len(request.ids) - 1))
            feeds.append(Feed(start, [*request.ids[start:], *draft], len(draft) + 1))
            self.rows.append(rows[-1])
        self._make_room(used_rows=first)
        if start and self._prefix_slot is not None:
            self.model.slots.reserve(len(self.rows), start)
            self.model.slots.put(first, len(rows), self._prefix_slot[:, :, :start])
        if len(rows) == 1:
            feeds = [self._read_ahead(first, feeds[0])]
        logits, which = self.model.forward(first, feeds, share=True)
        return self._take(first, rows, logits, which)

    def _make_room(self, used_rows: int) -> None:
        """Give back slots that are longer or more than the rows at work need, where memory is short."""
        longest = max(_room(row.request) for row in self.rows)
        used = max((row.num_read for row in self.rows[:used_rows]), default=0)
        self.model.slots.limit(self.memory_bytes, len(self.rows), longest, used_rows, used)

    def _read_ahead(self, slot: int, feed: Feed) -> Feed:
        """Read a long prompt in pieces up to the last one, which is left."""
        start, tokens = feed.start, list(feed.tokens)
        while len(tokens) - feed.num_logits > MAX_TOKENS_AT_ONCE:
            self.model.forward(slot, [Feed(start, tokens[:MAX_TOKENS_AT_ONCE], 1)])
            start, tokens = start + MAX_TOKENS_AT_ONCE, tokens[MAX_TOKENS_AT_ONCE:]
        return Feed(start, tokens, feed.num_logits)

    def _use_prefix(self, waiting: Sequence[Request]) -> int:
        """How many first tokens of all waiting prompts need not be read again; reads them if they are many."""
        common = _common(request.ids for request in waiting)
        common = min(common, min(len(request.ids) for request in waiting) - 1)
        ids = list(waiting[0].ids[:common])
        known = _common((self._prefix, ids))
        if common - known < MIN_PREFIX or len(waiting) < MIN_SHARING:
            return known if known >= MIN_PREFIX else 0
        slot = len(self.rows)
        feed = self._read_ahead(slot, Feed(0, ids, 1))
        self.model.forward(slot, [feed])
        self._prefix, self._prefix_slot = ids, self.model.slots.take(slot, common)
        return common

    @torch.inference_mode()
    def _step(self) -> list[Row]:
        """Read every row's last token, and what is guessed to follow."""
        feeds = []
        for row in self.rows:
            limit = min(self.MAX_GUESS, row.request.max_new_tokens - len(row.tokens) - 1)
            row.proposed = self._propose(row)[: max(limit, 0)]
            feeds.append(Feed(row.num_read, [row.tokens[-1], *row.proposed], len(row.proposed) + 1))
        self._make_room(used_rows=len(self.rows))
        logits, which = self.model.forward(0, feeds)
        return self._take(0, list(self.rows), logits, which)

    def _propose(self, row: Row) -> list[int]:
        return self.lookup.guess([*row.request.ids[-Lookup.SPAN :], *row.tokens], self.MAX_GUESS)

    def _take(self, first: int, rows: list[Row], logits: torch.Tensor, which: np.ndarray) -> list[Row]:
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
            while (
                chosen[at + size - 1] not in self.end_tokens
                and size < count
                and (chosen[at + size - 1] == row.proposed[size - 1])
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
        return finished

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
