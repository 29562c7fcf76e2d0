"""Texts as hashes of their words and of runs of words, for many texts at once."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

# Scripts without spaces between words: each character counts as a word. (Thai to Myanmar, Khmer, kana, Han.)
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_ASCII_WORD = re.compile(r"[a-z0-9]+")
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


class Ragged(NamedTuple):
    """A list of lists of hashes, flat: list i is `values[starts[i]:starts[i + 1]]`."""

    values: Hashes
    """[n] uint64."""
    starts: Indices
    """[num_lists + 1] int64, from 0 to n."""

    @property
    def lengths(self) -> Indices:
        return np.diff(self.starts)

    @property
    def owners(self) -> Indices:
        """[n] the number of the list that each value is in."""
        return np.repeat(np.arange(len(self.starts) - 1), self.lengths)

    def pick(self, wanted: npt.NDArray[np.bool_]) -> Ragged:
        """The lists that are wanted."""
        lengths = self.lengths
        return Ragged(self.values[np.repeat(wanted, lengths)], offsets(lengths[wanted]))


class _Vocabulary(dict[str, int]):
    """Numbers the words that it is asked for, and keeps the hash of each."""

    def __init__(self) -> None:
        self.hashes: list[int] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self.hashes)
        self.hashes.append(xxhash.xxh3_64_intdigest(word.encode()))
        return number


def hash_words(texts: Sequence[str]) -> Ragged:
    """64-bit hashes of the words of each text, in order: runs of letters and digits, without case or punctuation."""
    vocabulary = _Vocabulary()
    flat = array("l")
    starts = np.zeros(len(texts) + 1, np.int64)
    for row, text in enumerate(texts, 1):
        pattern = _ASCII_WORD if text.isascii() else _WORD
        flat.extend(map(vocabulary.__getitem__, pattern.findall(text.lower())))
        starts[row] = len(flat)
    return Ragged(np.array(vocabulary.hashes, np.uint64)[np.asarray(flat)], starts)


def hash_runs(words: Ragged, length: int) -> Ragged:
    """64-bit hashes of all runs of `length` words of each list; of fewer words the one run that they are.

    A multilinear hash (Lemire and Kaser 2014, "Strongly universal string hashing is fast"), then MurmurHash3's
    finalizer, so that any bits of it may be used.
    """
    num_words = words.lengths
    padded_lengths = np.where(num_words > 0, np.maximum(num_words, length), 0)
    padded_starts = offsets(padded_lengths)
    padded = np.zeros(padded_starts[-1], np.uint64)
    padded[np.arange(len(words.values)) + np.repeat(padded_starts[:-1] - words.starts[:-1], num_words)] = words.values

    multipliers = np.random.default_rng(length).integers(0, 1 << 63, length, np.uint64) * np.uint64(2) + np.uint64(1)
    sums = np.zeros(max(0, len(padded) - length + 1), np.uint64)
    for place, multiplier in enumerate(multipliers):
        sums += padded[place : place + len(sums)] * multiplier

    num_runs = np.where(num_words > 0, padded_lengths - length + 1, 0)
    starts = offsets(num_runs)
    inside = np.arange(starts[-1]) + np.repeat(padded_starts[:-1] - starts[:-1], num_runs)
    return Ragged(mix(sums[inside]), starts)


def offsets(lengths: npt.NDArray[np.integer]) -> Indices:
    """Where lists of these lengths begin if one follows the other, and where the last ends."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def mix(values: Hashes) -> Hashes:
    """MurmurHash3's 64-bit finalizer: a bijection after which every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
