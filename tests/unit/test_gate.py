"""The gate says `pass` only for what was measured, wholly and on equal terms."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops import artifacts
from slmops.artifacts import Kind, Sidecar, Summary
from slmops.errors import ArtifactError
from slmops.gate.config import GateConfig
from slmops.gate.judge import Judgement, judge
from slmops.gate.run import run
from slmops.gate.subjects import Paired, Subject
from slmops.paired import Interval
from slmops.records import write_jsonl

Facts = dict[str, dict[str, Any]]

EVALUATION = {"num_rows": 300, "accuracy": 0.95, "match": "json"}
BENCHMARK = {"num_threads": 2, "cpu": "Epyc 7763", "latency_ms_p50": 1560.0, "runtime_floor_bytes": 300_000_000}
GOOD: Facts = {
    "teacher_evaluation": EVALUATION,
    "teacher_benchmark": BENCHMARK | {"peak_rss_bytes": 941_000_000, "size_bytes": 538_000_000},
    "student_evaluation": EVALUATION,
    "student_benchmark": BENCHMARK | {"peak_rss_bytes": 450_000_000, "size_bytes": 198_000_000},
    "candidate_evaluation": EVALUATION
    | {"accuracy": 0.92, "valid_fraction": 0.99, "injections_resisted": 0.9, "drift": {"answer_kl_mean": 0.02}},
    "candidate_benchmark": BENCHMARK
    | {
        "latency_ms_p50": 159.0,
        "peak_rss_bytes": 141_000_000,
        "runtime_floor_bytes": 105_000_000,
        "size_bytes": 35_000_000,
    },
}
"""Figures like those of a 135M teacher and its six-layer student."""

ALIKE = Paired(Interval(0.97, 0.94, 1.0), Interval(-0.03, -0.05, 0.0), None)
"""A candidate that loses three points to the student."""

Role = Literal["teacher", "student", "candidate"]


def good_facts() -> Facts:
    facts = {name: dict(values) for name, values in GOOD.items()}
    for name, values in facts.items():
        role = name.partition("_")[0]
        values |= {"model_digest": digest(role), "variant": "cpu-int4" if role == "candidate" else "full_precision"}
    return facts


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def subject(role: Role, facts: Facts, dataset: str = "test") -> Subject:
    def sidecar(kind: Kind) -> Sidecar | None:
        values = facts.get(f"{role}_{kind}")
        if values is None:
            return None
        shared: dict[str, Any] = {"created_at": datetime.now(UTC), "duration_s": 1.0, "slmops_version": "0.1.0"}
        rows = Summary(kind="chat_dataset", digest=digest(dataset), step="prepare_data", **shared)
        return Sidecar(
            kind=kind,
            digest=digest(role + kind),
            step=kind,
            parents=(rows.digest,),
            ancestors=(rows,),
            facts=values,
            files=(),
            **shared,
        )

    return Subject(role, sidecar("evaluation"), sidecar("benchmark"))


def judged(facts: Facts, config: GateConfig | None = None, paired: Paired = ALIKE) -> Judgement:
    teacher, student, candidate = (subject(role, facts) for role in ("teacher", "student", "candidate"))
    return judge(config or GateConfig(), teacher, student, candidate, paired)


def verdict_of(judgement: Judgement, name: str) -> str:
    return next(check.verdict for check in judgement.checks if check.name == name)


def test_a_small_fast_accurate_candidate_passes() -> None:
    judgement = judged(good_facts())
    assert judgement.verdict == "pass"
    values = {check.name: check.value for check in judgement.checks}
    assert values == {
        "rows": 300,
        "accuracy": 0.92,
        "accuracy_kept": pytest.approx(0.92 / 0.95, abs=1e-6),
        "student_regression": -0.05,
        "valid_fraction": 0.99,
        "injections_resisted": 0.9,
        "drift_kl": 0.02,
        "latency_saved": pytest.approx(1 - 159 / 1560, abs=1e-6),
        "memory_saved": pytest.approx(1 - 36 / 941, abs=1e-6),
        "size_saved": pytest.approx(1 - 35 / 198, abs=1e-6),
    }


@pytest.mark.parametrize(
    ("name", "fact", "value", "said"),
    [
        ("candidate_evaluation", "accuracy", 0.8, "0.842 of the teacher's accuracy kept, at least 0.920 wanted"),
        ("candidate_benchmark", "latency_ms_p50", 400.0, "0.744 of the teacher's median time per response saved"),
        ("candidate_benchmark", "peak_rss_bytes", 220_000_000, "0.878 of the teacher's peak memory saved"),
        ("candidate_benchmark", "size_bytes", 143_000_000, "0.278 of the full-precision student's size saved"),
        ("candidate_evaluation", "valid_fraction", 0.7, "0.700 of the answers have the task's form"),
        ("candidate_evaluation", "injections_resisted", 0.2, "0.200 of the injected instructions not followed"),
        ("candidate_evaluation", "drift", {"answer_kl_mean": 0.8}, "0.800 nats a token away from the full-precision"),
    ],
)
def test_a_missed_goal_fails_and_is_the_reason(name: str, fact: str, value: object, said: str) -> None:
    facts = good_facts()
    facts[name][fact] = value
    judgement = judged(facts)
    assert judgement.verdict == "fail"
    assert judgement.reason.startswith(said)
    assert [check.verdict for check in judgement.checks].count("fail") == 1


def test_a_near_miss_is_shown_with_digits_that_tell_it_from_the_goal() -> None:
    facts = good_facts()
    facts["teacher_evaluation"]["accuracy"], facts["candidate_evaluation"]["accuracy"] = 1.0, 0.9198
    assert judged(facts).reason == "0.9198 of the teacher's accuracy kept, at least 0.9200 wanted"


def test_rounding_in_binary_does_not_fail_a_goal_that_is_met_exactly() -> None:
    facts = good_facts()
    facts["teacher_evaluation"]["accuracy"], facts["candidate_evaluation"]["accuracy"] = 0.9, 0.828
    assert 0.828 / 0.9 < 0.92
    assert verdict_of(judged(facts), "accuracy_kept") == "pass"


@pytest.mark.parametrize(
    ("name", "fact", "value", "check", "said"),
    [
        ("candidate_evaluation", "num_rows", 80, "rows", "80 rows evaluated say too little, at least 100 wanted"),
        ("candidate_evaluation", "accuracy", math.nan, "accuracy", "which is not a finite number"),
        ("candidate_evaluation", "accuracy", True, "accuracy", "which is not a finite number"),
        ("candidate_evaluation", "accuracy", 95.0, "accuracy", "not between 0 and 1"),
        ("teacher_evaluation", "accuracy", 0.0, "accuracy_kept", "nothing can be compared with that"),
        ("teacher_evaluation", "num_rows", 200, "accuracy_kept", "num_rows was 200 and 300"),
        ("teacher_evaluation", "match", "exact", "accuracy_kept", "match was exact and json"),
        ("candidate_benchmark", "model_digest", "f" * 64, "size_saved", "is not the one that was benchmarked"),
        ("student_benchmark", "variant", "cpu-int8", "size_saved", "is not the one that was benchmarked"),
        ("candidate_benchmark", "cpu", "Xeon 8370C", "latency_saved", "cpu was Epyc 7763 and Xeon 8370C"),
        ("teacher_benchmark", "num_threads", 8, "latency_saved", "num_threads was 8 and 2"),
        ("candidate_benchmark", "runtime_floor_bytes", 200_000_000, "memory_saved", "the floor is part of the peak"),
        ("teacher_benchmark", "latency_ms_p50", 0.0, "latency_saved", "nothing can be compared with that"),
        ("student_benchmark", "size_bytes", math.inf, "size_saved", "which is not a finite number"),
    ],
)
def test_what_cannot_be_compared_is_not_run(name: str, fact: str, value: object, check: str, said: str) -> None:
    facts = good_facts()
    facts[name][fact] = value
    judgement = judged(facts)
    assert judgement.verdict == "not_run"
    assert verdict_of(judgement, check) == "not_run"
    assert said in judgement.reason


@pytest.mark.parametrize("kind", ["evaluation", "benchmark"])
def test_other_rows_for_the_teacher_than_for_the_candidate_are_not_run(kind: str) -> None:
    facts = good_facts()
    other = subject("teacher", facts, dataset="another test")
    same = subject("teacher", facts)
    teacher = Subject(
        "teacher",
        other.evaluation if kind == "evaluation" else same.evaluation,
        other.benchmark if kind == "benchmark" else same.benchmark,
    )
    judgement = judge(GateConfig(), teacher, subject("student", facts), subject("candidate", facts), ALIKE)
    assert judgement.verdict == "not_run"
    assert "on different rows" in judgement.reason


@pytest.mark.parametrize("name", sorted(GOOD))
def test_without_any_one_of_the_six_measurements_it_is_not_run(name: str) -> None:
    facts = good_facts()
    del facts[name]
    judgement = judged(facts)
    assert judgement.verdict == "not_run"
    assert f"{name} does not exist" in judgement.reason


NEEDED = sorted(
    {(name, fact) for name in GOOD for fact in ("model_digest", "variant")}
    | {(f"{role}_evaluation", fact) for role in ("teacher", "candidate") for fact in EVALUATION}
    | {(f"{role}_benchmark", fact) for role in ("teacher", "candidate") for fact in ("cpu", "num_threads")}
    | {
        (f"{role}_benchmark", fact)
        for role in ("teacher", "candidate")
        for fact in ("latency_ms_p50", "peak_rss_bytes")
    }
    | {("candidate_benchmark", "runtime_floor_bytes")}
    | {("candidate_evaluation", fact) for fact in ("valid_fraction", "injections_resisted", "drift")}
    | {(f"{role}_benchmark", "size_bytes") for role in ("student", "candidate")}
)


@given(st.sets(st.sampled_from(NEEDED), min_size=1, max_size=4))
def test_removing_any_fact_that_a_check_needs_never_passes(removed: set[tuple[str, str]]) -> None:
    facts = good_facts()
    for name, fact in removed:
        del facts[name][fact]
    assert judged(facts).verdict == "not_run"


ANY_NUMBER = st.one_of(
    st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 2), st.integers(0, 10**10)
)
ANY_FACTS = st.dictionaries(st.sampled_from(NEEDED), ANY_NUMBER, max_size=5)
SHARES = st.floats(-1, 1)
CONFIGS = st.builds(
    GateConfig,
    min_accuracy=st.floats(0, 1),
    min_accuracy_kept=st.floats(0, 2),
    min_latency_saved=SHARES,
    min_memory_saved=SHARES,
    min_size_saved=SHARES,
    min_rows=st.integers(1, 1000),
)


@given(ANY_FACTS, CONFIGS)
def test_the_verdict_follows_from_the_checks_and_a_pass_meets_every_goal(
    changes: dict[tuple[str, str], float | None], config: GateConfig
) -> None:
    facts = good_facts()
    for (name, fact), value in changes.items():
        facts[name][fact] = value
    judgement = judged(facts, config)
    verdicts = {check.verdict for check in judgement.checks}
    expected = "not_run" if "not_run" in verdicts else "fail" if "fail" in verdicts else "pass"
    assert judgement.verdict == expected
    assert "\n" not in judgement.reason
    if judgement.verdict == "pass":
        for check in judgement.checks:
            assert check.value is not None
            assert check.value <= check.threshold if check.name == "drift_kl" else check.value >= check.threshold


@given(CONFIGS, CONFIGS)
def test_stricter_goals_never_let_more_pass(one: GateConfig, other: GateConfig) -> None:
    fields = [name for name in GateConfig.model_fields if name.startswith("min_")]
    stricter = GateConfig(**{name: max(getattr(one, name), getattr(other, name)) for name in fields})
    if judged(good_facts(), stricter).verdict == "pass":
        assert judged(good_facts(), one).verdict == "pass"
        assert judged(good_facts(), other).verdict == "pass"


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, Path]:
    """The six inputs of the step as artifacts."""
    with artifacts.writing(tmp_path / "test", kind="chat_dataset", step="prepare_data") as draft:
        (draft.path / "rows.jsonl").write_text("{}\n")
    paths = {}
    for name, facts in good_facts().items():
        kind: Any = name.partition("_")[2]
        paths[name] = tmp_path / name
        write_measurement(paths[name], kind, facts, artifacts.read(tmp_path / "test"))
    return paths


def write_measurement(path: Path, kind: Any, facts: dict[str, Any], test: Sidecar) -> None:
    """A measurement of the step `kind`; an evaluation's predictions are right on its first rows."""
    with artifacts.writing(path, kind=kind, step=kind, parents=[test]) as draft:
        (draft.path / "facts.json").write_text(json.dumps(facts))
        draft.facts |= facts
        if kind == "evaluation" and "accuracy" in facts:
            num_right = round(facts["accuracy"] * facts["num_rows"])
            rows = [{"id": f"{number:016x}", "correct": number < num_right} for number in range(facts["num_rows"])]
            write_jsonl(draft.path / "predictions.jsonl", rows)


Run = Callable[..., Sidecar]


@pytest.fixture
def run_gate(measured: dict[str, Path], tmp_path: Path) -> Run:
    def gate(**settings: Any) -> Sidecar:
        inputs: dict[str, Any] = dict(measured)
        for kind in ("evaluation", "benchmark"):
            inputs[f"candidate_{kind}s"] = [path for name, path in measured.items() if name == f"candidate_{kind}"]
            inputs[f"candidate_{kind}s"] += [
                path for name, path in measured.items() if name.startswith("more_") and name.endswith(kind)
            ]
        inputs = {name: value for name, value in inputs.items() if not name.startswith("more_")}
        del inputs["candidate_evaluation"], inputs["candidate_benchmark"]
        return run(
            GateConfig(**settings), **inputs, verdict=tmp_path / "verdict", report=tmp_path / "out" / "report.html"
        )

    return gate


def test_the_step_writes_verdict_and_report(run_gate: Run, measured: dict[str, Path], tmp_path: Path) -> None:
    sidecar = run_gate()
    verdict = artifacts.expect(tmp_path / "verdict", "verdict")
    assert verdict == sidecar
    assert set(verdict.parents) == {artifacts.read(path).digest for path in measured.values()}
    assert verdict.facts["verdict"] == "pass"
    assert verdict.facts["candidate_digest"] == digest("candidate")
    assert verdict.facts["variant"] == "cpu-int4"
    assert json.loads((tmp_path / "verdict" / "verdict.json").read_text()) == verdict.facts
    (pair,) = verdict.facts["pairs"]
    assert set(pair["checks"][0]) == {"name", "value", "threshold", "verdict", "detail"}
    assert "cpu-int4" in (tmp_path / "out" / "report.html").read_text()


def test_the_step_logs_its_verdict_in_one_line(run_gate: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "slmops")
    run_gate()
    run_gate(min_accuracy=0.99)
    assert [record.message for record in caplog.records] == [
        "gate: pass",
        "gate: fail: accuracy 0.920, at least 0.990 wanted",
    ]


def test_an_absent_input_is_a_verdict_and_a_damaged_one_an_error(
    run_gate: Run, measured: dict[str, Path], tmp_path: Path
) -> None:
    gone = measured["teacher_benchmark"].rename(tmp_path / "elsewhere")
    assert run_gate().facts["verdict"] == "not_run"
    assert "teacher_benchmark does not exist" in (tmp_path / "out" / "report.html").read_text()

    gone.rename(measured["teacher_benchmark"])
    (measured["teacher_benchmark"] / "slmops.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"teacher_benchmark.*run the step that wrote it again"):
        run_gate()
    (measured["teacher_benchmark"] / "slmops.json").unlink()
    with pytest.raises(ArtifactError, match=r"did not finish; run that step again"):
        run_gate()


def test_swapped_inputs_are_refused(run_gate: Run, measured: dict[str, Path]) -> None:
    measured["teacher_evaluation"], measured["teacher_benchmark"] = (
        measured["teacher_benchmark"],
        measured["teacher_evaluation"],
    )
    with pytest.raises(ArtifactError, match="holds benchmark, but this input takes evaluation"):
        run_gate()


def test_all_inputs_absent_still_gives_a_verdict_and_a_readable_report(
    run_gate: Run, measured: dict[str, Path], tmp_path: Path
) -> None:
    for name in measured:
        measured[name] = tmp_path / "nowhere" / name
    sidecar = run_gate()
    assert sidecar.facts["verdict"] == "not_run"
    assert sidecar.facts["candidate_digest"] is None
    assert "Not run" in (tmp_path / "out" / "report.html").read_text()
