"""Whether a prompt says something that none before it said."""

from __future__ import annotations

import math
from array import array

from rapidfuzz import process
from rapidfuzz.distance import Indel

from slmops.tasks.overlap import words

_FIRST_CHARACTER, _LAST_CHARACTER = 0xE000, 0x10FFFF
"""Words are kept as characters, so that a prompt is a string: from here no surrogates are in the way. There are a
million of them; words beyond share the last one."""

ROUNDING = 1e-9
"""What a product of the threshold may be off by: a count is never taken for one more than it is."""


class Novelty:
    """Texts so far, none of which a new one may be too like: ROUGE-L F1 below a threshold.

    Texts of a and b words reach F1 t only with t/2 (a+b) words in common. So if the words of all texts are put into one
    order, one of the first words of each, all but that many, is in both (prefix filtering: Chaudhuri et al. 2006,
    doi:10.1109/ICDE.2006.9). Only texts that share such a word are compared, and none is missed. A text takes 4 bytes a
    word, and a few hundred in the index.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._texts: list[str] = []
        self._characters: dict[str, str] = {}
        self._where: dict[int, array[int]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Take a text whatever it is like."""
        self._keep(self._encode(text))

    def add_if_novel(self, text: str) -> bool:
        """Whether `text` is unlike all before it; if so it is one of them from now on."""
        encoded = self._encode(text)
        if self._is_like_another(encoded):
            return False
        self._keep(encoded)
        return True

    def _is_like_another(self, encoded: str) -> bool:
        if not encoded:
            return True  # a text without a word says nothing
        similar = process.extractOne(
            encoded,
            [self._texts[number] for number in self._candidates(encoded)],
            processor=None,
            scorer=Indel.normalized_similarity,
            score_cutoff=self._threshold,
        )
        return similar is not None

    def _candidates(self, encoded: str) -> set[int]:
        """The texts that may be too like `encoded`."""
        found: set[int] = set()
        for length in self._lengths(len(encoded)):
            for character in self._prefix(encoded, length):
                found.update(self._where.get(_key(character, length), ()))
        return found

    def _keep(self, encoded: str) -> None:
        for character in self._prefix(encoded, self._lengths(len(encoded)).start):
            self._where.setdefault(_key(character, len(encoded)), array("I")).append(len(self._texts))
        self._texts.append(encoded)

    def _lengths(self, length: int) -> range:
        """How many words a text may have that is too like one of `length` words."""
        ratio = self._threshold / (2 - self._threshold)
        return range(math.ceil(length * ratio - ROUNDING), math.floor(length / ratio + ROUNDING) + 1)

    def _prefix(self, encoded: str, other_length: int) -> set[str]:
        """The words of a text, one of which at least is also in the prefix of any text of that length too like it.

        They are those that were first seen last: nearly the rarest, in an order that never changes.
        """
        common = math.ceil(self._threshold / 2 * (len(encoded) + other_length) - ROUNDING)
        return set(sorted(encoded, reverse=True)[: len(encoded) - common + 1])

    def _encode(self, text: str) -> str:
        return "".join(map(self._character, words(text)))

    def _character(self, word: str) -> str:
        if word not in self._characters:
            following = _FIRST_CHARACTER + len(self._characters)
            if following >= _LAST_CHARACTER:
                return chr(_LAST_CHARACTER)
            self._characters[word] = chr(following)
        return self._characters[word]


def _key(character: str, length: int) -> int:
    return ord(character) << 32 | length
