"""Each device class gets the smallest variant that passes on it; every other variant gets a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from slmops.artifacts import Sidecar
from slmops.gate.config import GateConfig
from slmops.gate.matrix import Candidate, Matrix, judge_all
from slmops.gate.subjects import Paired, Subject
from slmops.paired import Interval
from tests.unit.test_gate import digest, good_facts, subject

CLASSES = yaml.safe_load(Path("manifests/edge/device-classes.yaml").read_text())
X86 = {name: CLASSES[name] for name in ("x86-avx2", "x86-avx512-vnni")}
FAST = {
    "status": "measured",
    "time_to_first_token_ms_p95": 40.0,
    "latency_ms_p95": 120.0,
    "tokens_per_s": 250.0,
    "peak_rss_bytes_max": 141_000_000,
}


def candidate(
    variant: str = "cpu-int4", size: int = 35_000_000, *, on: Mapping[str, dict[str, Any]] | None = None
) -> Candidate:
    """A variant that holds all general thresholds; `on` has the facts of its benchmark on each class."""
    facts = good_facts()
    for kind in ("evaluation", "benchmark"):
        facts[f"candidate_{kind}"] |= {"variant": variant, "model_digest": digest(variant), "size_bytes": size}
    measured = subject("candidate", facts)
    assert measured.benchmark
    on_classes = {}
    for device_class, more in (on or {}).items():
        known = {"variant": variant, "model_digest": digest(variant), "size_bytes": size, "device_class": device_class}
        on_classes[device_class] = measured.benchmark.model_copy(update={"facts": known | more})
    paired = Paired(Interval(0.97, 0.94, 1.0), Interval(-0.03, -0.05, 0.0), None)
    return Candidate(variant, "cpu", measured, on_classes, paired)


def judged(*candidates: Candidate, classes: dict[str, Any] = X86, **settings: float) -> Matrix:
    teacher, student = subject("teacher", good_facts()), subject("student", good_facts())
    config = GateConfig.create({"device_classes": classes, "min_size_saved": 0.1, **settings})
    return judge_all(config, teacher, student, candidates)


def both(**changes: Any) -> dict[str, dict[str, Any]]:
    return {"x86-avx2": FAST | changes, "x86-avx512-vnni": FAST | changes}


def choices(matrix: Matrix) -> dict[str, str | None]:
    return {choice.device_class: choice.variant for choice in matrix.choices}


def test_each_class_gets_the_smallest_variant_that_passes_on_it() -> None:
    small = candidate(
        "cpu-int4", 35_000_000, on={"x86-avx2": FAST | {"latency_ms_p95": 12_000.0}, "x86-avx512-vnni": FAST}
    )
    large = candidate("cpu-int8", 60_000_000, on=both())
    matrix = judged(large, small)
    assert matrix.verdict == "pass"
    assert choices(matrix) == {"x86-avx2": "cpu-int8", "x86-avx512-vnni": "cpu-int4"}
    first, second = matrix.choices
    assert first.digest == digest("cpu-int8")
    assert first.lost == {"cpu-int4": "fail: 12,000 ms for an answer, 95th percentile, at most 10,000 wanted"}
    assert second.lost == {"cpu-int8": "it passes, but cpu-int4 is smaller"}
    assert matrix.facts()["choices"][0]["variant"] == "cpu-int8"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latency_ms_p95": 10_001.0}, "ms for an answer"),
        ({"time_to_first_token_ms_p95": 251.0}, "ms to the first token"),
        ({"tokens_per_s": 39.0}, "39.000 tokens/s decoded, at least 40.000 wanted"),
        ({"peak_rss_bytes_max": 2_000_000_000}, "bytes of memory at most in use"),
    ],
)
def test_every_objective_of_a_class_counts(changes: dict[str, float], said: str) -> None:
    matrix = judged(candidate(on={"x86-avx2": FAST | changes}), classes={"x86-avx2": X86["x86-avx2"]})
    assert matrix.verdict == "fail"
    assert said in matrix.reason


def test_a_kill_by_the_memory_limit_is_a_failure_with_its_reason() -> None:
    killed = {"status": "failed", "reason": "killed by its memory limit of 1,024 MiB"}
    matrix = judged(candidate(on={"x86-avx2": killed, "x86-avx512-vnni": FAST}))
    assert choices(matrix) == {"x86-avx2": None, "x86-avx512-vnni": "cpu-int4"}
    assert matrix.choices[0].verdict == "fail"
    assert "killed by its memory limit of 1,024 MiB" in matrix.choices[0].reason


def test_figures_that_a_failed_measurement_left_do_not_count() -> None:
    left = FAST | {"status": "failed", "reason": "its memory reached 2,000 MiB, the device has 1,024 MiB"}
    matrix = judged(candidate(on={"x86-avx2": left}), classes={"x86-avx2": X86["x86-avx2"]})
    assert matrix.verdict == "fail"
    assert matrix.choices[0].reason == left["reason"]
    gone = FAST | {"status": "not_run", "reason": "no such device"}
    assert judged(candidate(on={"x86-avx2": gone}), classes={"x86-avx2": X86["x86-avx2"]}).verdict == "not_run"


def test_what_was_not_measured_on_a_class_never_passes_on_it() -> None:
    elsewhere = {"status": "not_run", "reason": "the class is aarch64, this machine is x86_64"}
    matrix = judged(candidate(on={"x86-avx2": FAST, "arm64-pi5": elsewhere}), classes=CLASSES)
    verdicts = {choice.device_class: choice.verdict for choice in matrix.choices}
    assert verdicts == {
        "x86-avx2": "pass",
        "x86-avx512-vnni": "not_run",
        "arm64-pi5": "not_run",
        "arm64-server": "not_run",
        "nvidia-8gb": "not_run",
        "arm64-npu-qnn": "not_run",
    }
    reasons = {choice.device_class: choice.reason for choice in matrix.choices}
    assert "this machine is x86_64" in reasons["arm64-pi5"]
    assert "not benchmarked as arm64-server" in reasons["arm64-server"]
    assert "no variant for cuda was built" in reasons["nvidia-8gb"]
    assert "Qualcomm's SDK" in reasons["arm64-npu-qnn"]
    assert matrix.reason == "1 of 6 device classes have a variant: x86-avx2 gets cpu-int4"


def test_a_benchmark_of_other_bytes_does_not_count() -> None:
    one = candidate(on=both())
    other = one.on_classes["x86-avx2"]
    swapped = other.model_copy(update={"facts": other.facts | {"model_digest": "f" * 64}})
    matrix = judged(replace(one, on_classes={"x86-avx2": swapped}), classes={"x86-avx2": X86["x86-avx2"]})
    assert matrix.verdict == "not_run"
    assert "is not the one that was benchmarked" in matrix.reason


def test_a_benchmark_of_another_class_does_not_count() -> None:
    one = candidate(on=both())
    wrong: dict[str, Sidecar] = {"x86-avx2": one.on_classes["x86-avx512-vnni"]}
    matrix = judged(replace(one, on_classes=wrong), classes={"x86-avx2": X86["x86-avx2"]})
    assert matrix.verdict == "not_run"
    assert "the benchmark is of x86-avx512-vnni, not of x86-avx2" in matrix.reason


def test_the_quality_floor_is_held_against_the_lower_end_of_the_interval() -> None:
    one = candidate(on=both())
    unsure = replace(one, paired=replace(one.paired, retention=Interval(0.95, 0.79, 1.0)))
    assert judged(one).verdict == "pass"
    assert judged(unsure).verdict == "fail"


def test_a_champion_that_is_better_by_more_than_may_be_lost_stops_the_candidate() -> None:
    one = candidate(on=both())
    worse = replace(one, paired=replace(one.paired, from_champion=Interval(-0.1, -0.2, -0.02)))
    assert judged(worse).verdict == "fail"
    assert "against the champion" in judged(worse).choices[0].reason
    assert judged(worse, max_regression=0.25).verdict == "pass"
    unknown = replace(one, paired=replace(one.paired, from_champion="they were not evaluated on the same rows"))
    assert judged(unknown).verdict == "not_run"


def test_no_class_with_a_variant_is_no_pass() -> None:
    slow = candidate(on=both(latency_ms_p95=20_000.0))
    matrix = judged(slow)
    assert matrix.verdict == "fail"
    assert matrix.reason.startswith("no device class has a variant; x86-avx2: 20,000")
    assert matrix.headline.variant == "cpu-int4"


def test_without_classes_the_smallest_variant_that_passes_here_is_chosen() -> None:
    matrix = judged(candidate("cpu-int8", 60_000_000), candidate("cpu-int4", 35_000_000), classes={})
    assert choices(matrix) == {"": "cpu-int4"}
    assert matrix.headline.digest == digest("cpu-int4")


def test_a_candidate_without_evaluation_is_not_run() -> None:
    one = candidate(on=both())
    bare = replace(one, subject=Subject("candidate", None, one.subject.benchmark))
    assert judged(bare).verdict == "not_run"
