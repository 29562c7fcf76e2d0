"""A causal language model run over rows of different lengths at once, without padding, on key-value slots of its own.

All tokens of a forward pass lie one behind the other in a batch of one, so the matrix products see no padding; only
attention, a small part of a small model's work, sees rows. Tokens that rows have in common at their beginning
are computed once. This is how serving engines batch (Orca, Yu et al. 2022; RadixAttention, Zheng et al. 2023), with
slots in place of pages, which suits answers that are short beside the memory of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

PACKED = "slmops_packed"
"""Name of the attention that a packed model uses."""

LENGTH_STEP = 64
"""Slots grow by this many tokens, so that they are rarely copied."""

CHANGES_WITH_LENGTH = {"dynamic", "longrope"}
"""Rotary embeddings whose angles depend on the longest row of a batch."""

KNOWN_LAYERS = {"full_attention", "sliding_attention"}

PROBE = ((5, 6, 7, 8, 9, 10, 11), (5, 6, 7, 8, 12), (5, 6, 13, 14, 15, 16, 17, 18))
"""Rows of tokens by which a model is tried; some begin alike."""


class NotPackable(Exception):
    """The model does something at attention that packed rows do not; it is to be run another way."""


@dataclass
class Pass:
    """What attention has to know of one forward pass: n rows in neighbouring slots, T tokens in all.

    A row has at most Q new tokens; L is the longest row after it.
    """

    slots: Slots
    first: int
    num_rows: int
    num_queries: int
    """Q"""
    num_keys: int
    """L"""
    starts: torch.Tensor
    """[n] tokens that each row had before."""
    store_from: torch.Tensor | None
    """[S] which of the T tokens are stored; None for all in order."""
    store_to: torch.Tensor
    """[S] where, in the slots seen as one long row."""
    spread: torch.Tensor | None
    """[n * Q] which of the T tokens each query is; None if they lie so already."""
    collect: torch.Tensor | None
    """[T] the query that each token is; None if they lie so already."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype, groups: int) -> torch.Tensor:
        """[n, 1, groups * Q, L] 0 where a query sees a key, -inf elsewhere."""
        if window not in self.masks:
            device = self.starts.device
            at = self.starts[:, None] + torch.arange(self.num_queries, device=device)
            keys = torch.arange(self.num_keys, device=device)
            seen = keys <= at[:, :, None]
            if window is not None:
                seen &= keys > at[:, :, None] - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
            self.masks[window] = mask.repeat(1, groups, 1).unsqueeze(1)
        return self.masks[window]


class Slots:
    """Keys and values of rows, in one block that grows with their number and with the longest of them."""

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, like: torch.Tensor) -> None:
        self._like = like
        self._shape = (2, num_layers, num_heads, head_dim)
        self.block = self._zeros(0, 0)
        """[2, layers, rows, length, heads, head_dim]"""

    def clear(self) -> None:
        """Give the memory back."""
        self.block = self._zeros(0, 0)

    @property
    def bytes_per_token(self) -> int:
        return math.prod(self._shape) * self._like.element_size()

    def _zeros(self, rows: int, length: int) -> torch.Tensor:
        # Zeros, because attention multiplies what it does not see by 0, and 0 times what memory holds may be NaN.
        two, layers, heads, dim = self._shape
        return self._like.new_zeros(two, layers, rows, length, heads, dim)

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` rows of `length` tokens; what is there stays."""
        have_rows, have_length = self.block.shape[2:4]
        if rows > have_rows or length > have_length:
            self._resize(max(rows, have_rows), max(-(-length // LENGTH_STEP) * LENGTH_STEP, have_length))

    def limit(self, size_bytes: int, rows: int, length: int, used_rows: int, used_length: int) -> None:
        """Give back what is not used, if making room for `rows` rows of `length` would take more than `size_bytes`.

        One long row among many short ones must not make room for many long ones.
        """
        have_rows, have_length = self.block.shape[2:4]
        if max(rows, have_rows) * max(length, have_length) * self.bytes_per_token > size_bytes:
            self._resize(used_rows, used_length)

    def _resize(self, rows: int, length: int) -> None:
        block = self._zeros(rows, length)
        kept = (
            slice(None),
            slice(None),
            slice(min(rows, self.block.shape[2])),
            slice(min(length, self.block.shape[3])),
        )
        block[kept] = self.block[kept]
        self.block = block

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` tokens of rows to other slots."""
        if sources:
            self.block[:, :, list(targets), :length] = self.block[:, :, list(sources), :length]

    def take(self, row: int, length: int) -> torch.Tensor:
        """A copy of a row's first tokens: [2, layers, length, heads, head_dim]."""
        return self.block[:, :, row, :length].clone()

    def put(self, first: int, num_rows: int, piece: torch.Tensor) -> None:
        """Begin rows with what `take` gave."""
        self.block[:, :, first : first + num_rows, : piece.shape[2]] = piece.unsqueeze(2)

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, length, heads, head_dim]."""
        return self.block[0, number], self.block[1, number]


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed: Pass | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of T packed tokens: query [1, H, T, D], key and value [1, H_kv, T, D]; gives [1, T, H, D]."""
    unusual = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if packed is None or unusual:
        raise NotPackable(unusual[0] if unusual else "options do not reach attention")
    keys, values = packed.slots.layer(int(module.layer_idx))  # type: ignore[arg-type]
    for stored, new in ((keys, key), (values, value)):
        new = new[0].transpose(0, 1)
        if packed.store_from is not None:
            new = new[packed.store_from]
        stored.flatten(0, 1).index_copy_(0, packed.store_to, new)
    rows = slice(packed.first, packed.first + packed.num_rows)
    n, q_len, heads, dim = packed.num_rows, packed.num_queries, query.shape[1], query.shape[3]
    groups = heads // keys.shape[2]
    queries = query[0].transpose(0, 1)
    if packed.spread is not None:
        queries = queries[packed.spread]
    # Heads that share a key lie one behind the other, as more queries of that key: nothing is repeated.
    queries = queries.reshape(n, q_len, heads // groups, groups, dim).permute(0, 2, 3, 1, 4)
    result = F.scaled_dot_product_attention(
        queries.reshape(n, heads // groups, groups * q_len, dim),
        keys[rows, : packed.num_keys].transpose(1, 2),
        values[rows, : packed.num_keys].transpose(1, 2),
        attn_mask=packed.mask(sliding_window, query.dtype, groups),
        scale=scaling,
    )
    result = result.reshape(n, heads // groups, groups, q_len, dim).permute(0, 3, 1, 2, 4).reshape(-1, heads, dim)
    return (result if packed.collect is None else result[packed.collect]).unsqueeze(0), None


AttentionInterface.register(PACKED, _attend)


def _check_config(config: Any) -> None:
    """Raise NotPackable for what short rows would not show."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if kinds & CHANGES_WITH_LENGTH:
        raise NotPackable("its positions depend on the longest row")
    if unknown := set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS:
        raise NotPackable(f"it has layers of {', '.join(sorted(unknown))}")
    if getattr(config, "attention_chunk_size", None):
        raise NotPackable("its attention sees chunks")


@dataclass(frozen=True)
class Feed:
    """New tokens of one row."""

    start: int
    """Tokens that its slot holds already."""
    tokens: Sequence[int]
    num_logits: int
    """Logits are wanted behind this many of the last tokens."""


class PackedModel:
    """Forward passes over rows in slots. The model keeps packed attention from here on.

    Raises:
        NotPackable: the model needs a way of its own to remember what it read; it is left as it was.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        _check_config(config)
        if not getattr(model, "_supports_attention_backend", False):
            raise NotPackable("its attention cannot be exchanged")
        self.model = model
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.slots = Slots(config.num_hidden_layers, heads, dim, next(model.parameters()))
        before = model.config._attn_implementation
        try:
            expected = self._unpacked(PROBE)
            model.set_attn_implementation(PACKED)
            found = self._probe()
        except Exception as error:  # whatever an unknown architecture makes of packed rows
            model.set_attn_implementation(before)
            raise NotPackable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
        difference = float((found - expected).norm() / expected.norm())
        tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
        if not difference <= tolerance:
            model.set_attn_implementation(before)
            raise NotPackable(f"its logits differ by {difference:.1%} when rows are packed")

    @torch.inference_mode()
    def _unpacked(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """[rows, V] the model's own logits behind each row."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        device = self.model.device
        logits = [
            self.model(input_ids=torch.tensor([[i % vocabulary for i in row]], device=device), use_cache=False).logits
            for row in rows
        ]
        return torch.stack([row[0, -1].float() for row in logits])

    @torch.inference_mode()
    def _probe(self) -> torch.Tensor:
        """`_unpacked` the packed way: a beginning that is shared, then pieces of different length."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        rows = [[i % vocabulary for i in row] for row in PROBE]
        self.forward(0, [Feed(0, row[:4], 1) for row in rows], share=True)
        logits, which = self.forward(0, [Feed(4, row[4:], 1) for row in rows])
        return logits[torch.as_tensor(which, device=logits.device)].float()

    def forward(self, first: int, feeds: Sequence[Feed], *, share: bool = False) -> tuple[torch.Tensor, np.ndarray]:
        """Read new tokens of the rows in the slots from `first` on.

        Args:
            first: slot of the first row.
            feeds: one for each row.
            share: compute what rows have in common at their beginning once; they must start alike.

        Returns:
            logits [N, V], and [sum of num_logits] which of them is behind which token, row by row.
        """
        lengths = [len(feed.tokens) for feed in feeds]
        starts = np.array([feed.start for feed in feeds])
        nodes, tokens, positions = _share(feeds) if share else _apart(feeds, lengths)
        num_queries, num_keys = max(lengths), int((starts + lengths).max())
        self.slots.reserve(first + len(feeds), num_keys)
        rows = np.repeat(np.arange(len(feeds)), lengths)
        within = np.concatenate([np.arange(length) for length in lengths])
        flat = np.concatenate(nodes)
        spread = np.zeros((len(feeds), num_queries), dtype=np.int64)
        spread[rows, within] = flat
        collect = np.zeros(len(tokens), dtype=np.int64)
        collect[flat] = rows * num_queries + within
        is_dense = len(tokens) == spread.size
        wanted, back = np.unique(
            np.concatenate([node[len(node) - feed.num_logits :] for node, feed in zip(nodes, feeds, strict=True)]),
            return_inverse=True,
        )
        device = self.model.device

        def tensor(values: Any) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.long).to(device)

        packed = Pass(
            slots=self.slots,
            first=first,
            num_rows=len(feeds),
            num_queries=num_queries,
            num_keys=num_keys,
            starts=tensor(starts),
            store_from=None if len(flat) == len(tokens) else tensor(flat),
            store_to=tensor((first + rows) * self.slots.block.shape[3] + starts[rows] + within),
            spread=None if is_dense else tensor(spread.ravel()),
            collect=None if is_dense else tensor(collect),
        )
        output: Any = self.model(
            input_ids=tensor(tokens).unsqueeze(0),
            position_ids=tensor(positions).unsqueeze(0),
            use_cache=False,
            logits_to_keep=tensor(wanted),
            packed=packed,
        )
        return output.logits[0], back


def _apart(feeds: Sequence[Feed], lengths: Sequence[int]) -> tuple[list[np.ndarray], list[int], np.ndarray]:
    """Every token for itself: which token of the pass each of a row's is, the tokens, and their positions."""
    ends = list(accumulate(lengths))
    nodes = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    tokens = [token for feed in feeds for token in feed.tokens]
    positions = np.concatenate([np.arange(feed.start, feed.start + len(feed.tokens)) for feed in feeds])
    return nodes, tokens, positions


def _share(feeds: Sequence[Feed]) -> tuple[list[np.ndarray], list[int], list[int]]:
    """As `_apart`, with one token where rows have the same beginning: a trie."""
    children: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    positions: list[int] = []
    nodes = []
    for feed in feeds:
        node, path = -1, []
        for offset, token in enumerate(feed.tokens):
            found = children.setdefault((node, token), len(tokens))
            if found == len(tokens):
                tokens.append(token)
                positions.append(feed.start + offset)
            node = found
            path.append(node)
        nodes.append(np.array(path))
    return nodes, tokens, positions
