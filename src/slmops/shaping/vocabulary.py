"""The vocabulary of a domain: which tokens of a byte-level BPE tokenizer stay, and the tokenizer of only those.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) cuts a word into its bytes and then, as long as two
neighbours have a merge, applies the merge of the lowest rank, the leftmost first.

**Text of the domain is cut as before.** Nothing ever merges across the border of a token in the result, so what merges
inside it is what merges when its own bytes are encoded alone: its derivation. With every token in use, the tokens of
its derivation are kept, and with them the merges between kept tokens, in their order. By induction over the steps, the
merge that fired next was the lowest of all that could; it is still there, so it is the lowest of those left. Where
none could fire before, none can now.

**Any text can be encoded**, because all tokens of a single byte stay. What the domain never says becomes more tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from slmops.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Vocabulary:
    """The rows of a model's embedding that stay, and why."""

    ids: list[int]
    """Rows that stay, in rising order; the new id of each is its place in this list."""
    num_used: int
    """How many of them the domain's text uses."""
    num_required: int
    """How many more stay whatever the text: single bytes, added tokens, and what used tokens are merged from."""

    @property
    def num_filled(self) -> int:
        """How many stay beyond that, to reach the wanted size."""
        return len(self.ids) - self.num_used - self.num_required


def choose_vocabulary(
    tokenizer: Mapping[str, Any],
    used: Iterable[int],
    *,
    always: Iterable[int],
    num_rows: int,
    min_size: int,
    multiple: int,
) -> Vocabulary:
    """Tokens that stay: those in use with their derivations, single bytes, added tokens, and more to fill the size up.

    The size is the next multiple of `multiple`, if the model has so many rows. It is filled up in the order of the
    merges, which is that of frequency in the text that the tokenizer was trained on; rows without a token come last.

    Args:
        tokenizer: What tokenizer.json holds.
        used: Token ids of the domain's text.
        always: Ids that the model's config names.
        num_rows: Rows of the model's embedding; there may be more of them than tokens.
        min_size: The least size.
        multiple: What the size is a multiple of.

    Raises:
        ModelError: it is no byte-level BPE tokenizer, or has more tokens than the model has rows.
        ConfigError: min_size leaves nothing out.
    """
    pairs = _BytePairs(tokenizer)
    added = {entry["id"] for entry in tokenizer["added_tokens"]}
    _check_sizes(max(added | set(pairs.vocab.values())) + 1, num_rows, min_size)
    of_id = {number: token for token, number in pairs.vocab.items()}
    in_use = set(used)
    tokens = {token for token in pairs.vocab if len(token) == 1}
    for number in in_use & of_id.keys():
        tokens |= pairs.derivation(of_id[number])
    ids = in_use | added | set(always) | _named_by_post_processor(tokenizer) | {pairs.vocab[token] for token in tokens}
    num_required = len(ids) - len(in_use)
    size = min(-(-max(len(ids), min_size) // multiple) * multiple, num_rows)
    _fill(ids, pairs, size, num_rows)
    return Vocabulary(sorted(ids), len(in_use), num_required)


def shrink_tokenizer(tokenizer: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """A tokenizer.json of the tokens `ids`, numbered by their place among them; the merges between them stay in order.

    Args:
        tokenizer: What tokenizer.json holds; it is left as it is.
        ids: From `choose_vocabulary`, in rising order.
    """
    place = {number: at for at, number in enumerate(ids)}
    result = copy.deepcopy(dict(tokenizer))
    model = result["model"]
    vocab = {token: place[number] for token, number in model["vocab"].items() if number in place}
    model["vocab"] = dict(sorted(vocab.items(), key=lambda entry: entry[1]))
    model["merges"] = [
        [left, right]
        for left, right in map(_pair, model["merges"])
        if left in vocab and right in vocab and left + right in vocab
    ]
    result["added_tokens"] = [entry | {"id": place[entry["id"]]} for entry in result["added_tokens"]]
    _renumber_post_processor(result.get("post_processor"), place.__getitem__)
    if result.get("padding"):
        result["padding"]["pad_id"] = place[result["padding"]["pad_id"]]
    return result


def check_byte_level(tokenizer: Mapping[str, Any]) -> None:
    """Refuse a tokenizer whose tokens are not made of bytes by merges.

    Raises:
        ModelError: it is another kind.
    """
    model, reason = tokenizer.get("model") or {}, ""
    settings = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model.get("type") != "BPE":
        reason = f"a {model.get('type', 'nameless')} tokenizer"
    elif given := [name for name in settings if model.get(name)]:
        reason = f"a BPE tokenizer with {', '.join(given)}"
    elif not all(_has_byte_level(tokenizer, *names) for names in (("pre_tokenizer", "normalizer"), ("decoder",))):
        reason = "a BPE tokenizer of characters, not of bytes"
    if reason:
        raise ModelError(
            f"the model has {reason}; only the vocabulary of a byte-level BPE tokenizer (GPT-2, Llama 3, Qwen, "
            "SmolLM2) can be cut to a domain, so set vocabulary=kept"
        )


class _BytePairs:
    """Tokens and merges of a byte-level BPE tokenizer."""

    def __init__(self, tokenizer: Mapping[str, Any]) -> None:
        check_byte_level(tokenizer)
        model = tokenizer["model"]
        self.vocab: dict[str, int] = model["vocab"]
        self.ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
        self.whole_words = bool(model.get("ignore_merges"))
        """Whether a word that is a token becomes that token, whatever its merges say."""

    def derivation(self, token: str) -> set[str]:
        """Every token that arises while `token` is encoded alone, and itself."""
        return self._encode(token)[1] | {token}

    def leads_to(self, token: str) -> bool:
        """Whether any text becomes `token`; a tokenizer may hold tokens that no text does."""
        return self.whole_words or self._encode(token)[0] == [token]

    def by_rank(self) -> Iterator[str]:
        """What merges make, in the order of the merges."""
        return (left + right for left, right in self.ranks)

    def _encode(self, text: str) -> tuple[list[str], set[str]]:
        """The tokens of `text`, and all that arose on the way; bytes that are no tokens are left out of both."""
        parts = [byte for byte in text if byte in self.vocab]
        arisen = set(parts)
        while True:
            ranks = [(self.ranks.get(pair), at) for at, pair in enumerate(pairwise(parts))]
            _, at = min(((rank, at) for rank, at in ranks if rank is not None), default=(0, -1))
            if at < 0:
                return parts, arisen
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            arisen.add(parts[at])


def _fill(ids: set[int], pairs: _BytePairs, size: int, num_rows: int) -> None:
    """Add tokens to `ids` until there are `size`: by the rank of their merges, then rows that no text leads to."""
    for token in pairs.by_rank():
        if len(ids) == size:
            return
        missing = {pairs.vocab[part] for part in pairs.derivation(token)} - ids
        if len(ids) + len(missing) <= size and pairs.leads_to(token):
            ids |= missing
    ids.update(sorted(set(range(num_rows)) - ids)[: size - len(ids)])


def _check_sizes(num_tokens: int, num_rows: int, min_size: int) -> None:
    if num_tokens > num_rows:
        raise ModelError(
            f"the tokenizer has ids up to {num_tokens - 1}, but the model's embedding has only {num_rows} rows; save "
            "the model with its own tokenizer"
        )
    if min_size >= num_rows:
        raise ConfigError(
            f"min_vocab_size={min_size} leaves out none of the model's {num_rows} tokens; give less, or set "
            "vocabulary=kept"
        )


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two halves of a merge; older files have them as one text with a space between."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _has_byte_level(tokenizer: Mapping[str, Any], *names: str) -> bool:
    """Whether one of these parts of a tokenizer, or of what it is made of, works on bytes."""

    def is_byte_level(part: Mapping[str, Any] | None) -> bool:
        if not part:
            return False
        inner = [each for key in ("pretokenizers", "normalizers", "decoders") for each in part.get(key, ())]
        return part["type"] == "ByteLevel" or any(map(is_byte_level, inner))

    return any(is_byte_level(tokenizer.get(name)) for name in names)


def _named_by_post_processor(tokenizer: Mapping[str, Any]) -> set[int]:
    """Ids of what is put around every text."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    _renumber_post_processor(copy.deepcopy(tokenizer.get("post_processor")), note)
    return found


def _renumber_post_processor(processor: dict[str, Any] | None, renumber: Callable[[int], int]) -> None:
    """Give the ids in a post-processor other numbers, in place."""
    if not processor:
        return
    for inner in processor.get("processors", ()):
        _renumber_post_processor(inner, renumber)
    if processor["type"] == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            special["ids"] = list(map(renumber, special["ids"]))
    for name in ("sep", "cls"):
        if name in processor:
            token, number = processor[name]
            processor[name] = [token, renumber(number)]
