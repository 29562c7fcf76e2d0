"""Which teacher answers: by task, then by weight, the same in every shard."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.errors import ConfigError
from slmops.records import ChatRecord
from slmops.teachers.config import TeacherSpec
from slmops.teachers.mixture import Mixture
from tests.datasets import chat_record

ROWS = [chat_record(f"prompt {number}", "reference") for number in range(3000)]


def spec(name: str, weight: float = 1.0, tasks: tuple[str, ...] = ()) -> TeacherSpec:
    return TeacherSpec(name=name, weight=weight, tasks=list(tasks))


def of_task(task: str, record: ChatRecord = ROWS[0]) -> ChatRecord:
    return record.model_copy(update={"task": task})


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.integers(0, 2**32))
@settings(max_examples=8, deadline=None)
def test_shares_come_close_to_the_weights(weights: list[float], seed: int) -> None:
    mixture = Mixture([spec(f"t{number}", weight) for number, weight in enumerate(weights)], seed)
    counts = Counter(mixture.teacher_of(row) for row in ROWS)
    for number, weight in enumerate(weights):
        assert counts[f"t{number}"] / len(ROWS) == pytest.approx(weight / sum(weights), abs=0.05)


def test_the_draw_depends_on_seed_and_prompt_alone() -> None:
    specs = [spec("a", 2), spec("b"), spec("c")]
    drawn = [Mixture(specs, 1).teacher_of(row) for row in ROWS[:300]]
    again = Mixture(specs[::-1], 1)
    assert [again.teacher_of(row) for row in reversed(ROWS[:300])] == drawn[::-1]
    other_reference = chat_record("prompt 7", "another reference")
    assert again.teacher_of(other_reference) == drawn[7]
    assert [Mixture(specs, 2).teacher_of(row) for row in ROWS[:300]] != drawn


def test_a_teacher_that_joins_moves_only_its_own_prompts() -> None:
    before = Mixture([spec("a"), spec("b")], 0)
    after = Mixture([spec("a"), spec("b"), spec("c")], 0)
    moved = [row for row in ROWS if before.teacher_of(row) != after.teacher_of(row)]
    assert {after.teacher_of(row) for row in moved} == {"c"}
    assert len(moved) / len(ROWS) == pytest.approx(1 / 3, abs=0.05)


def test_tasks_go_to_the_teachers_that_name_them() -> None:
    mixture = Mixture([spec("all"), spec("sums", tasks=("mathematics",)), spec("judge", weight=0)], 0)
    assert {mixture.teacher_of(of_task("mathematics", row)) for row in ROWS[:50]} == {"sums"}
    assert {mixture.teacher_of(row) for row in ROWS[:50]} == {"all"}


def test_a_task_without_a_teacher_is_said() -> None:
    with pytest.raises(ConfigError, match="no teacher answers task chat"):
        Mixture([spec("sums", tasks=("mathematics",))], 0).teacher_of(ROWS[0])


def test_mixtures_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="names of their own, found a twice"):
        Mixture([spec("a"), spec("a")], 0)
    with pytest.raises(ConfigError, match="weight above 0, found 1 without"):
        Mixture([spec("a", weight=0)], 0)
