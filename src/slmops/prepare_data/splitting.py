"""Which row goes into which split: by seed and stratum, or as the rows say, and never one prompt in two splits."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from slmops.prepare_data.chats import Messages

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Chat:
    """A usable row."""

    id: str
    prompt_id: str
    messages: Messages
    stratum: str


def split_by_seed(chats: Sequence[Chat], shares: Mapping[Split, float], seed: int) -> dict[Split, list[Chat]]:
    """Divide `chats` by `shares`, which add up to 1, the same way in whatever order they come.

    In each stratum each split gets its share rounded up or down; which of the two, is chosen so that the whole data
    set comes out right too. Each split gets at least one row if there are as many rows as splits.
    """
    strata: dict[str, list[Chat]] = defaultdict(list)
    for chat in chats:
        strata[chat.stratum].append(chat)
    owed = dict.fromkeys(shares, 0.0)
    parts: dict[Split, list[Chat]] = {split: [] for split in shares}
    for stratum in sorted(strata, key=lambda name: _draw(seed, "stratum", name)):
        members = iter(shuffled(strata[stratum], seed, "split"))
        for split, count in _round(len(strata[stratum]), shares, owed).items():
            parts[split].extend(next(members) for _ in range(count))
    _leave_none_empty(parts, seed)
    return parts


def shuffled(chats: Iterable[Chat], seed: int, purpose: str = "order") -> list[Chat]:
    """`chats` in an order that depends on seed and purpose, not on the order they come in."""
    return sorted(chats, key=lambda chat: _draw(seed, purpose, chat.id))


def drop_leaks(parts: Mapping[Split, list[Chat]]) -> tuple[dict[Split, list[Chat]], int]:
    """Keep a prompt out of train if validation or test has it, and out of validation if test has it.

    Returns:
        The remaining rows, and how many were dropped.
    """
    judged = {chat.prompt_id for chat in parts["test"]}
    validation = [chat for chat in parts["validation"] if chat.prompt_id not in judged]
    judged |= {chat.prompt_id for chat in validation}
    train = [chat for chat in parts["train"] if chat.prompt_id not in judged]
    kept: dict[Split, list[Chat]] = {"train": train, "validation": validation, "test": list(parts["test"])}
    return kept, sum(len(parts[split]) - len(kept[split]) for split in kept)


def count_contradictions(chats: Iterable[Chat]) -> int:
    """Prompts that occur with more than one completion."""
    answers: dict[str, set[str]] = defaultdict(set)
    for chat in chats:
        answers[chat.prompt_id].add(chat.id)
    return sum(len(ids) > 1 for ids in answers.values())


def _round(count: int, shares: Mapping[Split, float], owed: dict[Split, float]) -> dict[Split, int]:
    """Whole numbers that add up to `count`, each its share rounded up or down.

    `owed` carries what each split got too little so far; the splits that are owed most are rounded up.
    """
    ideal = {split: count * share for split, share in shares.items()}
    # Products such as 0.1 * 30 must count as the whole numbers that they stand for.
    given = {split: math.floor(value + 1e-9) for split, value in ideal.items()}
    for split, value in ideal.items():
        owed[split] += value - given[split]
    fractional = [split for split in shares if ideal[split] - given[split] > 1e-9]
    fractional.sort(key=lambda split: -owed[split])
    for split in fractional[: count - sum(given.values())]:
        given[split] += 1
        owed[split] -= 1
    return given


def _leave_none_empty(parts: dict[Split, list[Chat]], seed: int) -> None:
    for split, members in parts.items():
        largest = max(parts, key=lambda name: len(parts[name]))
        if not members and len(parts[largest]) > 1:
            moved = shuffled(parts[largest], seed, f"fill {split}")[0]
            parts[largest].remove(moved)
            members.append(moved)


def _draw(seed: int, purpose: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()
