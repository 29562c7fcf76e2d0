"""Which of several answers is kept: by agreement, by a judge, or the first."""

from __future__ import annotations

import pytest

from slmops.errors import ConfigError
from slmops.tasks.mathematics import Mathematics
from slmops.teachers.interface import Decoding
from slmops.teachers.selection import Choice, choose, judge_question, read_score
from tests.datasets import chat_record

SAME = Mathematics().correct
DECODING = Decoding(max_new_tokens=8)


def test_the_most_frequent_final_answer_wins_whatever_leads_to_it() -> None:
    candidates = ["5 + 5\nAnswer: 10", "6 * 7 = 42\nAnswer: 42", None, r"It is \boxed{42.0}"]
    assert choose("agreement", candidates, correct=SAME) == Choice(1, agreement=0.5)


def test_a_tie_goes_to_the_first_and_a_single_answer_agrees_with_itself() -> None:
    assert choose("agreement", ["Answer: 1", "Answer: 2"], correct=SAME) == Choice(0, agreement=0.5)
    assert choose("agreement", ["no number"], correct=SAME) == Choice(0, agreement=1.0)


def test_the_judges_best_wins() -> None:
    candidates = ["a", None, "b", "c"]
    assert choose("judge", candidates, correct=SAME, scores=[7, 10, 9, 9]) == Choice(2, score=9)
    assert choose("judge", candidates, correct=SAME, scores=[None, None, None, 1]) == Choice(3, score=1)
    assert choose("judge", candidates, correct=SAME, scores=[None] * 4) is None


def test_the_first_that_is_there() -> None:
    assert choose("first", [None, "a", "b"], correct=SAME) == Choice(1)


@pytest.mark.parametrize("method", ["first", "agreement", "judge"])
def test_nothing_is_chosen_from_nothing(method: str) -> None:
    assert choose(method, [None, None], correct=SAME, scores=[None, None]) is None


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="select must be first, agreement or judge, got 'best'"):
        choose("best", ["a"], correct=SAME)


def test_a_judge_is_asked_about_one_answer_with_the_rubric() -> None:
    question = judge_question(chat_record("2 + 2?", "4"), "It is 5", DECODING, seed=3, rubric="Is it right?")
    (turn,) = question.messages
    assert "<answer>\nIt is 5\n</answer>" in turn["content"]
    assert "[user]\n2 + 2?" in turn["content"]
    assert "Is it right?" in turn["content"]
    assert "\n4\n" not in turn["content"], "the judge does not see the reference"
    other = judge_question(chat_record("2 + 2?", "4"), "It is 4", DECODING, seed=3)
    assert other.key != question.key


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7), (" **10**\n", 10), ("Score: 3", 3), ("8/10", 8), ("9.", 9),
        ("0", None), ("11", None), ("7.5", None), ("7 or 8", None), ("It deserves 9", None), ("", None), ("-3", None),
    ],
)  # fmt: skip
def test_a_score_is_read_strictly(text: str, score: int | None) -> None:
    assert read_score(text) == score
