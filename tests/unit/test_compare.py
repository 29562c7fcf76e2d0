"""compare: what distillation added is said with its interval, and only of models that were judged on the same rows."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.compare.bootstrap import Comparison, intervals
from slmops.compare.config import CompareConfig
from slmops.compare.report import headline
from slmops.compare.run import run
from slmops.compare.subjects import Role
from slmops.errors import ArtifactError, DataError
from slmops.evaluate.config import EvaluateConfig
from slmops.evaluate.run import run as evaluate
from slmops.records import write_jsonl

INJECTION = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"
QUICK = CompareConfig(num_resamples=500)
CURVES = {
    "loss_curve": [[1, 4.0], [2, None], [10, 0.5]],
    "validation_curve": [[1, 4.2], [10, 0.7]],
    "metric_curve": [[1, 0.1], [10, 0.84]],
    "num_parameters": 722_000,
}

NUM_ROWS = 200
RIGHT: dict[str, range] = {
    "teacher": range(190),
    "untrained": range(10),
    "labels_only": range(140),
    "distilled": range(10, 180),
}
"""Which of the 200 rows each model answers right: the student has lost 20 of the teacher's."""

Compare = Callable[..., Sidecar]


def write_evaluation(path: Path, right: Sequence[int], *, num_rows: int = NUM_ROWS, facts: dict[str, Any] | None = None,
                     parents: Sequence[Sidecar] = ()) -> Path:  # fmt: skip
    """An evaluation as evaluate writes it, of a model that is right on the rows `right`."""
    with artifacts.writing(path, kind="evaluation", step="evaluate", parents=parents) as draft:
        correct = set(right)
        write_jsonl(
            draft.path / "predictions.jsonl",
            (
                {
                    "id": f"{number:016x}",
                    "prompt": [{"role": "user", "content": f"what is row {number} {INJECTION}"}],
                    "reference": f"answer {number}",
                    "prediction": f"answer {number}" if number in correct else f"nonsense {path.name} {INJECTION}",
                    "correct": number in correct,
                    "stratum": f"stratum {number // 50}",
                }
                for number in range(num_rows)
            ),
        )
        draft.facts |= {"num_rows": num_rows, "match": "exact", "variant": "full_precision"} | (facts or {})
    return path


@pytest.fixture
def evaluations(tmp_path: Path) -> dict[str, Path]:
    """Four evaluations, that of the distilled student with the model it is of."""
    with artifacts.writing(tmp_path / "student", kind="hf_model", step="distill") as draft:
        (draft.path / "weights").write_text("distilled")
        draft.facts |= CURVES
    measured = {
        "macro_f1": 0.81, "exact_match": 0.85, "rouge_l": 0.9, "bleu": 71.25, "perplexity": 1.375,
        "size_bytes": 35_123_456,
        "expected_calibration_error": 0.043,
        "reliability": [{"low": 0.8, "high": 0.9, "num_rows": 200, "confidence": 0.85, "accuracy": 0.9}],
    }  # fmt: skip
    return {
        role: write_evaluation(
            tmp_path / role,
            right,
            facts=measured if role == "distilled" else {},
            parents=[draft.sidecar] if role == "distilled" else [],
        )
        for role, right in RIGHT.items()
    }


@pytest.fixture
def compare(evaluations: dict[str, Path], tmp_path: Path) -> Compare:
    """Runs the step over the evaluations, without those named."""

    def run_it(*absent: str, config: CompareConfig = QUICK, **more: Path) -> Sidecar:
        given: dict[str, Any] = {role: path for role, path in evaluations.items() if role not in absent} | more
        return run(config, **given, comparison=tmp_path / "comparison", report=tmp_path / "out" / "report.html")

    return run_it


def words_of(page: Path) -> str:
    """The page's words, without markup, with plain spaces."""
    body = re.sub(r"<(style|title)\b.*?</\1>|<[^>]*>", " ", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", body.replace("&#39;", "'").replace("&lt;", "<").replace("&gt;", ">"))


def test_what_distillation_added_is_said_in_words_and_in_figures(compare: Compare, tmp_path: Path) -> None:
    facts = compare(model=tmp_path / "student").facts
    assert (
        facts["headline"].replace("\u00a0", " ")
        == "Distillation adds 15.0 points of accuracy to what labels alone teach."
    )
    assert facts["distilled_minus_labels_only"] == pytest.approx(30 / 200)
    assert 0 < facts["distilled_minus_labels_only_low"] < 0.15 < facts["distilled_minus_labels_only_high"] < 0.25
    assert facts["distilled_minus_labels_only_finding"] == facts["distilled_minus_untrained_finding"] == "more"
    assert facts["distilled_minus_teacher_finding"] == facts["distilled_retention_finding"] == "less"
    assert facts["distilled_retention"] == pytest.approx(170 / 190)
    assert facts["labels_only_retention"] == pytest.approx(140 / 190)
    counted = {name: facts[f"num_{name}_right"] for name in ("both", "only_teacher", "only_distilled", "neither")}
    assert counted == {"both": 170, "only_teacher": 20, "only_distilled": 0, "neither": 10}
    assert facts["mcnemar_p"] == pytest.approx(2 * 0.5**20)
    assert json.loads((tmp_path / "comparison" / "comparison.json").read_text()) == facts
    sidecar = artifacts.expect(tmp_path / "comparison", "comparison")
    assert len(sidecar.parents) == 5
    assert sidecar.metrics()["distilled_accuracy"] == 0.85


def test_the_page_shows_figures_curves_calibration_and_where_they_differ(compare: Compare, tmp_path: Path) -> None:
    compare()
    page, words = (tmp_path / "out" / "report.html"), words_of(tmp_path / "out" / "report.html")
    assert "Distillation adds 15.0 points of accuracy to what labels alone teach." in words
    assert "the interval is clear of zero" in words
    assert re.search(
        r"Accuracy with 95 % interval 0\.950 \(0\.9\d+–0\.9\d+\) 0\.050 .* 0\.850 \(0\.\d+–0\.\d+\) Macro", words
    )
    assert "BLEU 0 to 100 – – – 71.2" in words
    assert "Size on disk – – – 35.1 MB Parameters – – – 722 k" in words
    assert 'aria-label="Distilled student, distill: 10 steps; training loss 4.00 → 0.500' in page.read_text()
    assert "held-out rows answered right 10.0 % → 84.0 %" in words
    assert 'aria-label="Share of right answers by confidence: distilled student 0.90 right at 0.85' in page.read_text()
    first = words.index("stratum 3")
    assert words[first:].startswith("stratum 3 50 0.800 0.000 0.000 0.600 −20.0"), "the largest difference comes first"
    assert "Only the teacher is right: the first 4 of 20" in words
    assert "Only the distilled" not in words, "there is no such row"
    assert "None" not in words
    assert "nan" not in words.lower().split()


def test_what_models_and_users_wrote_is_shown_and_not_run(compare: Compare, tmp_path: Path) -> None:
    compare()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert f"what is row 0 {INJECTION}" in words_of(tmp_path / "out" / "report.html")
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|url\((?!#)|@import", page), "nothing is loaded from elsewhere"


def test_the_same_inputs_give_the_same_bytes_and_examples_are_bounded(compare: Compare, tmp_path: Path) -> None:
    page = tmp_path / "out" / "report.html"
    compare()
    first = page.read_text()
    compare()
    assert page.read_text() == first
    compare(config=CompareConfig(num_resamples=100, max_examples=0))
    assert page.read_text().count("<article") == 0
    compare(config=CompareConfig(num_resamples=100, max_examples=1))
    assert page.read_text().count("<article") == 3


def test_without_labels_alone_the_untrained_student_is_the_measure(compare: Compare, tmp_path: Path) -> None:
    facts = compare("labels_only").facts
    assert (
        facts["headline"]
        .replace("\u00a0", " ")
        .startswith("Training adds 80.0 points of accuracy to what the untrained")
    )
    assert "labels_only_accuracy" not in facts
    facts = compare("labels_only", "untrained").facts
    assert facts["headline"].startswith("What distillation added was not measured")
    assert "keeps 89.5 % of the teacher's accuracy" in words_of(tmp_path / "out" / "report.html")


@pytest.mark.parametrize("role", ["untrained", "labels_only", "distilled"])
def test_other_rows_are_refused_with_the_first_that_differs(
    compare: Compare, evaluations: dict[str, Path], role: str
) -> None:
    write_evaluation(evaluations[role], RIGHT[role], num_rows=150)
    with pytest.raises(
        DataError, match=f"{role} and teacher were not evaluated on the same rows: row 151 is missing for {role}"
    ):
        compare()
    shifted = [json.loads(line) for line in (evaluations["teacher"] / "predictions.jsonl").read_text().splitlines()]
    shifted[6], shifted[7] = shifted[7], shifted[6]
    with artifacts.writing(evaluations[role], kind="evaluation", step="evaluate") as draft:
        write_jsonl(draft.path / "predictions.jsonl", shifted)
        draft.facts["match"] = "exact"
    with pytest.raises(
        DataError, match=r"row 7 is '0+7' for \w+ and '0+6' for teacher; evaluate both on the same test"
    ):
        compare()


def test_answers_that_were_judged_by_another_rule_are_refused(compare: Compare, evaluations: dict[str, Path]) -> None:
    write_evaluation(evaluations["labels_only"], RIGHT["labels_only"], facts={"match": "json"})
    with pytest.raises(
        DataError, match="match was json for labels_only and exact for teacher; evaluate both with the same"
    ):
        compare()


def test_a_model_that_is_not_the_evaluated_one_and_wrong_inputs_are_refused(
    compare: Compare, evaluations: dict[str, Path], tmp_path: Path
) -> None:
    with artifacts.writing(tmp_path / "other", kind="hf_model", step="distill") as other:
        (other.path / "weights").write_text("other")
    with pytest.raises(ArtifactError, match="so it is not the distilled student that was evaluated"):
        compare(model=tmp_path / "other")
    with pytest.raises(ArtifactError, match="holds hf_model, but this input takes evaluation"):
        compare(teacher=tmp_path / "other")
    with pytest.raises(ArtifactError, match="does not exist"):
        compare(untrained=tmp_path / "nowhere")
    write_evaluation(evaluations["teacher"], [0], num_rows=1)
    write_evaluation(evaluations["distilled"], [0], num_rows=1)
    with pytest.raises(DataError, match="1 row was evaluated, which says nothing of chance"):
        compare("untrained", "labels_only")
    assert not (tmp_path / "comparison").exists()


def found(kind: str, right: dict[Role, list[bool]], config: CompareConfig = QUICK) -> Comparison:
    correct = {role: np.array(values) for role, values in right.items()}
    result = intervals(correct, config).find(kind, "distilled", "teacher")  # type: ignore[arg-type]
    assert result
    return result


def test_a_small_difference_on_few_rows_is_not_called_clear() -> None:
    teacher = [True] * 15 + [False] * 5
    distilled = [True] * 14 + [False] * 5 + [True]
    difference = found("difference", {"teacher": teacher, "distilled": [*distilled[:-1], False]})
    assert difference.finding == "unclear"
    assert "the interval holds zero, so these rows do not tell the two apart" in difference.words


def test_the_same_rows_right_is_no_difference_and_all_rows_different_is_a_clear_one() -> None:
    same = found("difference", {"teacher": [True, False] * 10, "distilled": [True, False] * 10})
    assert same.finding == "equal"
    assert same.interval
    assert (same.interval.low, same.interval.high) == (0, 0)
    assert "these rows show no difference" in same.words
    opposite = found("difference", {"teacher": [True] * 20, "distilled": [False] * 20})
    assert opposite.finding == "less"
    assert opposite.interval
    assert opposite.interval.value == opposite.interval.high == -1


@pytest.mark.parametrize("num_right", [0, 1])
def test_a_share_of_nothing_is_unknown_and_the_words_say_why(num_right: int) -> None:
    teacher = [number < num_right for number in range(20)]
    kept = found("retention", {"teacher": teacher, "distilled": [True] * 20})
    assert kept.finding == "unknown"
    assert kept.interval is None
    assert "of 500 resamples the teacher answers no row right" in kept.words


def test_a_teacher_that_is_never_right_does_not_stop_the_page(
    compare: Compare, evaluations: dict[str, Path], tmp_path: Path
) -> None:
    write_evaluation(evaluations["teacher"], [])
    facts = compare().facts
    assert "distilled_retention" not in facts
    assert facts["distilled_retention_finding"] == "unknown"
    words = words_of(tmp_path / "out" / "report.html")
    assert "In 500 of 500 resamples the teacher answers no row right" in words
    assert "nan" not in words.lower().split()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_whatever_was_right_every_interval_holds_its_figure_or_is_absent(right: list[tuple[bool, bool, bool]]) -> None:
    roles: tuple[Role, ...] = ("teacher", "labels_only", "distilled")
    correct = {role: np.array(values) for role, values in zip(roles, zip(*right, strict=True), strict=True)}
    result = intervals(correct, CompareConfig(num_resamples=100, confidence_level=0.99))
    for compared in result.comparisons:
        if compared.interval is None:
            assert compared.finding == "unknown"
        else:
            assert np.isfinite([compared.interval.low, compared.interval.high]).all()
            assert compared.interval.low <= compared.interval.high
    shown = headline(result)
    assert "nan" not in f"{shown.title} {shown.reason}"


def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says() -> None:
    chance = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        teacher, distilled = chance.random(300) < 0.9, chance.random(300) < 0.8
        difference = intervals(
            {"teacher": teacher, "distilled": distilled},
            CompareConfig(num_resamples=300, confidence_level=0.9, seed=seed),
        ).find("difference", "distilled", "teacher")
        assert difference
        assert difference.interval
        covered += difference.interval.low <= -0.1 <= difference.interval.high
    assert 82 <= covered <= 97


def test_memory_stays_bounded_on_a_large_test() -> None:
    chance = np.random.default_rng(0)
    correct: dict[Role, Any] = {role: chance.random(100_000) < 0.8 for role in ("teacher", "labels_only", "distilled")}
    tracemalloc.start()
    intervals(correct, CompareConfig(num_resamples=200))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000_000, "200 resamples of 100,000 rows at once would take 160 MB for the indices alone"


def test_real_evaluations_of_real_models_are_compared(
    tiny_teacher: Path, tiny_model: Path, tiny_variants: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    def evaluated(name: str, model: Path, variant: str = "full_precision") -> Path:
        config = EvaluateConfig(max_new_tokens=4, variant=variant)
        evaluate(config, model=model, test=held_out_rows, evaluation=tmp_path / name)
        return tmp_path / name

    same = evaluated("teacher", tiny_teacher)
    facts = run(
        QUICK,
        teacher=same,
        distilled=same,
        untrained=evaluated("untrained", tiny_variants, "cpu-int4"),
        labels_only=evaluated("labels_only", tiny_model),
        model=tiny_teacher,
        comparison=tmp_path / "comparison",
        report=tmp_path / "report.html",
    ).facts
    assert facts["distilled_minus_teacher_finding"] == "equal"
    assert facts["distilled_minus_untrained_finding"] == facts["distilled_minus_labels_only_finding"] == "more"
    words = words_of(tmp_path / "report.html")
    assert "Teacher and distilled student are right on the same rows." in words
    assert "Distilled student, finetune" in words
    assert "4 models" in words


def test_random_data_never_breaks_the_page(evaluations: dict[str, Path], compare: Compare, tmp_path: Path) -> None:
    chance = random.Random(0)
    for seed in range(3):
        for path in evaluations.values():
            write_evaluation(
                path, [n for n in range(NUM_ROWS) if chance.random() < chance.random()], facts={"bleu": seed}
            )
        facts = compare().facts
        assert facts["num_rows"] == NUM_ROWS
        assert f"{facts['headline']}" in (tmp_path / "out" / "report.html").read_text()
