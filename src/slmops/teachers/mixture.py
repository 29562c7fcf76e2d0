"""Which of several teachers answers a prompt."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence

from slmops.errors import ConfigError
from slmops.records import ChatRecord
from slmops.teachers.config import TeacherSpec
from slmops.teachers.interface import Prompt


class Mixture:
    """Routes by task first; among the teachers that are left, each prompt is drawn one by weight.

    The draw depends on the seed and the prompt alone, so every shard and every run draws the same. It is rendezvous
    hashing (Thaler and Ravishankar 1998, doi:10.1109/90.663936) with weights (Schindelhauer and Schomaker 2005,
    doi:10.1145/1073970.1074008): a teacher that joins takes its share from the others and moves no other prompt, so
    what they answered before need not be asked again.
    """

    def __init__(self, specs: Sequence[TeacherSpec], seed: int) -> None:
        """Take teachers with names that differ; those with weight 0 answer nothing.

        Raises:
            ConfigError: two have the same name, or none has a weight.
        """
        if twice := [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]:
            raise ConfigError(f"teachers must have names of their own, found {', '.join(twice)} twice")
        self._specs = [spec for spec in specs if spec.weight > 0]
        if not self._specs:
            raise ConfigError(f"one of the teachers must have a weight above 0, found {len(specs)} without")
        self._seed = seed

    def teacher_of(self, record: ChatRecord) -> str:
        """The name of the teacher that answers `record`; see `draw`."""
        return self.draw(record.task, record.prompt)

    def draw(self, task: str, prompt: Prompt) -> str:
        """The name of the teacher that answers `prompt` of `task`.

        Raises:
            ConfigError: every teacher names its tasks, and none of them is `task`.
        """
        named = [spec for spec in self._specs if task in spec.tasks]
        specs = named or [spec for spec in self._specs if not spec.tasks]
        if not specs:
            raise ConfigError(
                f"no teacher answers task {task}: add it to the tasks of one, or let one teacher name no tasks"
            )
        if len(specs) == 1:
            return specs[0].name
        text = json.dumps(list(map(dict, prompt)), sort_keys=True)
        return min(specs, key=lambda spec: self._arrival(spec, text)).name

    def _arrival(self, spec: TeacherSpec, prompt: str) -> float:
        """An exponential time with the weight as its rate: who arrives first is drawn with a share of all weights."""
        digest = hashlib.sha256(f"{self._seed}\0{spec.name}\0{prompt}".encode()).digest()
        uniform = (int.from_bytes(digest[:8], "big") + 0.5) / 2**64
        return -math.log(uniform) / spec.weight
