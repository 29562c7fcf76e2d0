"""How much two texts share, counted in words."""

from __future__ import annotations

import re
import string
from collections import Counter

from rapidfuzz.distance import Indel

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f]|[^\W_]+")
ARTICLES = frozenset({"a", "an", "the"})
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + "“”‘’„«»–—…")


def words(text: str) -> list[str]:
    """Words in lower case without punctuation; in scripts without spaces each character counts as one."""
    return _WORD.findall(text.casefold())


def rouge_l(candidate: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, https://aclanthology.org/W04-1013), unstemmed.

    With precision L/a and recall L/b it is 2L/(a+b), which is the normalised similarity of insertions and deletions.
    """
    return float(Indel.normalized_similarity(words(candidate), words(reference)))


def normalized(text: str) -> str:
    """Lower case without punctuation, English articles and extra space, as SQuAD compares answers.

    Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250.
    """
    return " ".join(word for word in text.casefold().translate(_NO_PUNCTUATION).split() if word not in ARTICLES)


def token_f1(answer: str, reference: str) -> float:
    """F1 of the bags of normalised words, as in SQuAD; 1 if both are empty."""
    said, wanted = normalized(answer).split(), normalized(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))
