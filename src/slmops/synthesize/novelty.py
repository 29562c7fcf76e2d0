"""Whether a prompt says something that none before it said."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from rapidfuzz import process
from rapidfuzz.distance import Indel

from slmops.tasks.overlap import words

_FIRST_CHARACTER, _LAST_CHARACTER = 0xE000, 0x10FFFF
"""Words are kept as characters, so that a prompt is a string: from here no surrogates are in the way. There are a
million of them; words beyond share the last one."""


class Novelty:
    """Texts so far, none of which a new one may be too like: ROUGE-L F1 below a threshold.

    Two texts of a and b words reach F1 t only with t/2 (a+b) words in common, so one of a text's rarest words, all but
    that many, is in both (prefix filtering: Chaudhuri et al. 2006, doi:10.1109/ICDE.2006.9). Only texts that share such
    a word are compared, and none is missed. A text takes 4 bytes a word, and as many in the index.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._texts: list[str] = []
        self._characters: dict[str, str] = {}
        self._where: dict[str, array[int]] = {}

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

    def _candidates(self, encoded: str) -> Sequence[int]:
        """The texts that may be too like `encoded`, in order."""
        length = len(encoded)
        # F1 t between a and b words needs b >= a t / (2 - t), since at most b words are common.
        shortest = length * self._threshold / (2 - self._threshold)
        common = math.ceil(self._threshold / 2 * (length + shortest) - 1e-9)
        rarest = sorted(encoded, key=lambda character: len(self._where.get(character, ())))
        found: set[int] = set()
        for character in rarest[: length - common + 1]:
            found.update(self._where.get(character, ()))
        return sorted(found)

    def _keep(self, encoded: str) -> None:
        for character in set(encoded):
            self._where.setdefault(character, array("I")).append(len(self._texts))
        self._texts.append(encoded)

    def _encode(self, text: str) -> str:
        return "".join(map(self._character, words(text)))

    def _character(self, word: str) -> str:
        if word not in self._characters:
            following = _FIRST_CHARACTER + len(self._characters)
            if following >= _LAST_CHARACTER:
                return chr(_LAST_CHARACTER)
            self._characters[word] = chr(following)
        return self._characters[word]
