"""New prompts after examples from the seeds, each unlike all others, and answers to them.

Wang et al. 2022, https://arxiv.org/abs/2212.10560. Examples are drawn from the seeds alone, not from new prompts: so
each request is known beforehand, and a run that was killed asks the same ones again.
"""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from slmops.errors import DataError
from slmops.records import ChatRecord, Provenance
from slmops.synthesize.asking import Desk, Request, unanswered
from slmops.synthesize.config import SynthesizeConfig
from slmops.synthesize.novelty import Novelty
from slmops.teachers.interface import STOP, Answer

MAX_ROUND = 512
"""Requests of one round: novelty is judged between rounds, in the order of the requests."""

_ITEM = re.compile(r"^[ \t]*(?:\*\*)?(\d{1,3})[.):](?:\*\*)?[ \t]+", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Seed:
    """What a user asked once."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A new prompt that waits for its answer."""

    record: ChatRecord
    teacher: str
    """Who wrote it, and will answer it."""
    sources: tuple[str, ...]
    """Ids of the seeds that it was written after."""


Frame = tuple[str, str]
"""Task and system turn, which a new prompt has in common with its examples; no system turn is empty."""


def self_instruct(config: SynthesizeConfig, seeds: Iterable[ChatRecord], desk: Desk) -> Iterator[ChatRecord]:
    """Rows until `num_rows` are there or `max_requests` are asked.

    Raises:
        DataError: no seed can serve as an example.
    """
    frames = _frames(seeds)
    novelty = Novelty(config.novelty_threshold)
    for group in frames.values():
        for seed in group:
            novelty.add(seed.text)
    num_rows = 0
    waiting: list[_Prompt] = []
    while num_rows < config.num_rows and (waiting or desk.num_requests < config.max_requests):
        wanted = config.num_rows - num_rows
        if not waiting:
            left = config.max_requests - desk.num_requests
            size = min(math.ceil(wanted / config.prompts_per_request), MAX_ROUND, left)
            waiting = _new_prompts(config, frames, novelty, desk, size)
        for row in _answered(config, waiting[:wanted], desk):
            num_rows += 1
            yield row
        waiting = waiting[wanted:]


def _frames(seeds: Iterable[ChatRecord]) -> dict[Frame, list[Seed]]:
    """Seeds of one user turn, by what their new prompts have in common with them."""
    frames: dict[Frame, list[Seed]] = defaultdict(list)
    num_seeds = 0
    for record in seeds:
        num_seeds += 1
        match [(turn.role, turn.content) for turn in record.messages[:-1]]:
            case [("user", text)]:
                frames[record.task, ""].append(Seed(record.id, text))
            case [("system", system), ("user", text)]:
                frames[record.task, system].append(Seed(record.id, text))
    if not frames:
        raise DataError(f"none of {num_seeds} seeds is a single request of a user; give some that are")
    return dict(frames)


def _new_prompts(
    config: SynthesizeConfig, frames: dict[Frame, list[Seed]], novelty: Novelty, desk: Desk, num_requests: int
) -> list[_Prompt]:
    """What one round of requests brings."""
    drawn = [_draw(config, frames, desk, desk.num_requests + number) for number in range(num_requests)]
    desk.num_requests += num_requests
    found = []
    answers = desk.ask([request for request, _, _ in drawn])
    for (request, (task, system), sources), answer in zip(drawn, answers, strict=True):
        for text in _items(answer, desk) if answer else ():
            if reason := _unfit(config, text):
                desk.drops[reason] += 1
            elif not novelty.add_if_novel(text):
                desk.drops["not_novel"] += 1
            else:
                turns = [("system", system), ("user", text)] if system else [("user", text)]
                found.append(_Prompt(unanswered(task, turns), request.teacher, sources))
    return found


def _draw(
    config: SynthesizeConfig, frames: dict[Frame, list[Seed]], desk: Desk, number: int
) -> tuple[Request, Frame, tuple[str, ...]]:
    """The request of this number, always the same: frames are drawn by how many seeds they have."""
    chance = random.Random(f"{config.seed} {number}")
    (frame,) = chance.choices(list(frames), weights=[len(group) for group in frames.values()])
    group = frames[frame]
    examples = chance.sample(group, min(config.examples_per_request, len(group)))
    turns = ({"role": "user", "content": _instruction(frame, examples, config.prompts_per_request)},)
    request = Request(desk.mixture.draw(frame[0], turns), turns, config.seed + number)
    return request, frame, tuple(seed.id for seed in examples)


def _instruction(frame: Frame, examples: Sequence[Seed], num_prompts: int) -> str:
    _, system = frame
    listed = "\n".join(f"{number}. {seed.text}" for number, seed in enumerate(examples, 1))
    told = f'The assistant that they write to was told: "{system}"\n\n' if system else ""
    return (
        f"These are examples of what people write to an assistant.\n\n{listed}\n\n{told}"
        f"Write {num_prompts} new ones such as other people could write: in the same language and form, each about "
        f"something else than the examples and than each other. Write a list numbered from 1 to {num_prompts}, and "
        "nothing else. Do not answer them."
    )


def _items(answer: Answer, desk: Desk) -> list[str]:
    items = numbered_items(answer.text)
    if not items:
        desk.drops["no_list"] += 1
    if answer.finish_reason != STOP and items:
        desk.drops["truncated"] += 1
        items.pop()
    return items


def numbered_items(text: str) -> list[str]:
    """The items of a numbered list, which may have several lines; numbers must follow each other.

    What stands below an empty line after the last item is no part of it, but a remark.
    """
    starts: list[tuple[int, int]] = []
    expected = None
    for found in _ITEM.finditer(text):
        if expected is None or int(found[1]) == expected:
            expected = int(found[1]) + 1
            starts.append((found.start(), found.end()))
    ends = [*(start for start, _ in starts), len(text)][1:]
    items = [text[start:end].strip() for (_, start), end in zip(starts, ends, strict=True)]
    items[-1:] = [re.split(r"\n[ \t]*\n", item)[0] for item in items[-1:]]
    return [item[1:-1] if len(item) > 2 and item[0] == item[-1] == '"' else item for item in items]


def _unfit(config: SynthesizeConfig, text: str) -> str | None:
    if len(text) < config.min_prompt_chars:
        return "prompt_too_short"
    return "prompt_too_long" if len(text) > config.max_prompt_chars else None


def _answered(config: SynthesizeConfig, prompts: Sequence[_Prompt], desk: Desk) -> Iterator[ChatRecord]:
    """The rows that the prompts make with answers of those who wrote them."""
    requests = [
        Request(prompt.teacher, tuple(desk.tasks.of(prompt.record).ask(prompt.record)), config.seed)
        for prompt in prompts
    ]
    for prompt, answer in zip(prompts, desk.ask(requests), strict=True):
        if answer is not None and desk.usable(answer):
            provenance = Provenance(teacher=answer.model, method="self_instruct", sources=prompt.sources)
            if row := desk.finished_row(prompt.record, answer.text, provenance):
                yield row
