"""benchmark: figures of a real process, under the limits of a device, and of known timings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.benchmark.config import BenchmarkConfig
from slmops.benchmark.run import run
from slmops.device_classes import this_architecture
from slmops.errors import ConfigError, ModelError
from slmops.measuring import limits, process
from slmops.measuring.limits import MIB, Limits
from slmops.measuring.summary import percentile, summarize, summarize_repeats
from tests.limited import SMALL as DEVICE
from tests.limited import needs_cgroup, no_cgroup

SHORT: dict[str, Any] = {
    "variant": "cpu-int4", "num_requests": 2, "num_warmup": 1, "max_new_tokens": 4, "num_repeats": 1,
    "prompt_lengths": [16], "streams": [2],
}  # fmt: skip


@pytest.fixture
def benchmark(tiny_variants: Path, held_out_rows: Path, tmp_path: Path) -> Any:
    """Measures the tiny model's cpu-int4 variant; `device` are the fields in which the class differs from DEVICE."""

    def measured(settings: Mapping[str, Any] = {}, **device: Any) -> Sidecar:
        config = BenchmarkConfig.create(
            SHORT | {"device_class": "small", "device_classes": {"small": DEVICE | device}} | dict(settings)
        )
        return run(config, model=tiny_variants, prompts=held_out_rows, benchmark=tmp_path / "benchmark")

    return measured


def test_a_quantized_variant_is_measured_in_a_process_without_torch(
    tiny_variants: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    config = BenchmarkConfig(variant="cpu-int4", num_requests=4, num_warmup=1, max_new_tokens=8, num_repeats=2)
    facts = run(config, model=tiny_variants, prompts=held_out_rows, benchmark=tmp_path / "benchmark").facts
    variant = artifacts.read(tiny_variants).facts["variants"]["cpu-int4"]
    assert (facts["status"], facts["device_class"]) == ("measured", "")
    assert facts["model_digest"] == variant["digest"]
    assert 0 < facts["time_to_first_token_ms_p50"] <= facts["latency_ms_p50"] <= facts["latency_ms_p95"]
    assert facts["latency_ms_p95"] <= facts["latency_ms_p99"]
    assert (facts["num_requests"], facts["num_repeats"]) == (4, 2)
    assert len(json.loads((tmp_path / "benchmark" / "requests.json").read_text())) == 8
    assert facts["tokens_per_s"] > 0
    # From the start of the process: its imports and the model's loading are in it.
    assert facts["cold_start_ms"] > facts["load_s"] * 1000 > 0
    # A process that had imported torch would hold far more than the runtime and this model do.
    assert 0 < facts["runtime_floor_bytes"] < facts["peak_rss_bytes"] * 1.2 < 200e6
    assert facts["peak_rss_bytes"] <= facts["peak_rss_bytes_max"]
    # The model takes 1,024 tokens, so the longest of the default lengths leaves no room for an answer.
    assert [entry["prompt_tokens"] for entry in facts["time_to_first_token_by_prompt"]] == [16, 64, 256]
    assert [entry["streams"] for entry in facts["decode_by_streams"]] == [1, 4, 8]
    assert set(facts["spread"]) >= {"latency_ms_p50", "tokens_per_s", "cold_start_ms"}
    assert isinstance(facts["noisy"], bool)


def test_a_full_precision_model_is_measured_once_one_request_after_the_other(
    tiny_model: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    config = BenchmarkConfig(num_requests=2, num_warmup=0, max_new_tokens=8)
    facts = run(config, model=tiny_model, prompts=held_out_rows, benchmark=tmp_path / "benchmark").facts
    assert facts["runtime"].startswith("transformers ")
    assert facts["output_tokens_mean"] > 0
    assert facts["num_repeats"] == 1
    assert "decode_by_streams" not in facts
    assert "noisy" not in facts


def test_a_process_that_dies_is_an_error_with_its_last_words(
    tiny_variants: Path, held_out_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmops.measuring.process.sys.executable", "/bin/false")
    config = BenchmarkConfig(variant="cpu-int4", num_requests=1)
    with pytest.raises(ModelError, match="ended with code 1: no message"):
        run(config, model=tiny_variants, prompts=held_out_rows, benchmark=tmp_path / "benchmark")
    assert not (tmp_path / "benchmark").exists()


@needs_cgroup
def test_a_variant_is_measured_under_the_cpus_and_the_memory_of_a_class(benchmark: Any) -> None:
    facts = benchmark().facts
    assert (facts["status"], facts["device_class"], facts["limits"]) == ("measured", "small", "cgroup")
    assert facts["num_threads"] == 1
    assert facts["peak_rss_bytes_max"] < 512 * MIB


@needs_cgroup
def test_a_variant_that_needs_more_memory_than_the_class_has_failed(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The smallest class has 256 MiB, which the tiny model does not fill: what counts here as a MiB is smaller.
    monkeypatch.setattr(limits, "MIB", MIB // 10)
    facts = benchmark(ram_mib=300).facts
    assert facts["status"] == "failed"
    assert facts["reason"] == "killed by its memory limit of 300 MiB"
    assert (facts["limits"], facts["device_class"]) == ("cgroup", "small")
    assert facts["model_digest"]
    assert "latency_ms_p50" not in facts


def test_without_a_cgroup_the_memory_is_judged(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_group", no_cgroup)
    fits = benchmark(ram_mib=512).facts
    assert (fits["status"], fits["limits"]) == ("measured", "judged")
    monkeypatch.setattr(limits, "MIB", MIB // 10)
    facts = benchmark(ram_mib=300).facts
    assert (facts["status"], facts["limits"]) == ("failed", "judged")
    assert "the device has 300 MiB" in facts["reason"]
    # It ran, so what it took is told.
    assert facts["peak_rss_bytes_max"] > 30 * MIB


def test_a_container_whose_own_limit_is_the_classes_needs_no_cgroup_of_ours(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(limits, "memory_group", no_cgroup)
    (tmp_path / "memory.max").write_text(f"{512 * MIB}\n")
    monkeypatch.setattr("slmops.memory.LIMIT", tmp_path / "memory.max")
    assert benchmark(ram_mib=512).facts["limits"] == "cgroup"
    assert benchmark(ram_mib=400).facts["limits"] == "judged"


def test_the_runtime_stays_on_the_cpus_of_the_class(tiny_variants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = process.Task(quantized=True, num_threads=8, max_new_tokens=2, prompts=[[{"role": "user", "content": "a"}]])
    result = process.run_worker(tiny_variants / "cpu-int4", task, Limits(num_cpus=1, ram_bytes=MIB), None)
    assert result["cpus"] == limits.choose_cpus(1)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ({"architecture": "aarch64" if this_architecture() == "x86_64" else "x86_64"}, "this machine is"),
        ({"instruction_sets": ["AVX9000"]}, "lacks AVX9000"),
        ({"execution_provider": "qnn"}, "Qualcomm"),
    ],
)
def test_what_this_machine_is_not_is_not_run(benchmark: Any, device: dict[str, Any], reason: str) -> None:
    facts = benchmark(**device).facts
    assert facts["status"] == "not_run"
    assert reason in facts["reason"]
    assert facts["model_digest"]
    assert "latency_ms_p50" not in facts


def test_a_class_with_a_gpu_is_not_run_without_one(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmops.measuring.place.has_gpu", lambda: False)
    facts = benchmark(execution_provider="cuda").facts
    assert (facts["status"], facts["reason"]) == ("not_run", "this machine has no NVIDIA GPU, the device has one")


def test_fewer_cpus_and_more_features_than_the_class_are_told(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"sse2", "asimd", "avx2", "avx512f", "avx512_vnni", "i8mm"}
    monkeypatch.setattr("slmops.measuring.place.cpu_features", lambda: frozenset(found))
    monkeypatch.setattr("slmops.measuring.limits.os.sched_getaffinity", lambda _: {0})
    facts = benchmark(num_cpus=4).facts
    assert facts["status"] == "measured"
    assert (facts["num_cpus_missing"], facts["num_threads"]) == (3, 1)
    more = {"x86_64": ["avx512f", "avx512_vnni"], "aarch64": ["i8mm"]}
    assert facts["more_than_class"] == more[this_architecture()]


def test_a_model_that_does_not_load_has_failed_under_a_class(
    tiny_variants: Path, held_out_rows: Path, tmp_path: Path, benchmark: Any
) -> None:
    broken = shutil.copytree(tiny_variants, tmp_path / "broken")
    model = broken / "cpu-int4" / "model.onnx"
    model.write_bytes(b"\0" * model.stat().st_size)
    config = BenchmarkConfig(**SHORT, device_class="small", device_classes={"small": DEVICE})
    facts = run(config, model=broken, prompts=held_out_rows, benchmark=tmp_path / "benchmark").facts
    assert facts["status"] == "failed"
    assert "cannot be loaded by onnxruntime" in facts["reason"]
    with pytest.raises(ModelError, match="cannot be loaded by onnxruntime 1"):
        run(BenchmarkConfig(**SHORT), model=broken, prompts=held_out_rows, benchmark=tmp_path / "again")


def test_lengths_that_leave_no_room_in_the_classes_context_are_left_out(benchmark: Any) -> None:
    facts = benchmark({"prompt_lengths": [16, 99, 100, 1024]}).facts
    assert [entry["prompt_tokens"] for entry in facts["time_to_first_token_by_prompt"]] == [16, 99]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"device_class": "x"}, "device_class 'x' is not in device_classes, which is empty"),
        ({"device_classes": {"small": {}}}, "architecture"),
        ({"pool": "p"}, "pool is p, which needs device_class, store_uri, edge_image"),
        (
            {"pool": "p", "device_class": "small", "device_classes": {"small": DEVICE}, "store_uri": "store",
             "edge_image": "e"},
            "the nodes of a pool read s3://bucket/prefix",
        ),
        (
            {"device_class": "small", "device_classes": {"small": DEVICE}, "store_uri": "s3://b",
             "pool": "p", "edge_image": "e", "num_requests": 1000},
            "num_requests times num_repeats may be 1000 at most",
        ),
        ({"streams": [0]}, "streams"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        BenchmarkConfig.create(settings)


def test_known_timings_give_known_figures() -> None:
    facts = summarize(
        [{"first_s": 0.1, "total_s": 0.5, "num_tokens": 5}, {"first_s": 0.1, "total_s": 0.3, "num_tokens": 3}]
    )
    assert facts["latency_ms_p50"] == 400.0
    assert facts["tokens_per_s"] == 10.0
    assert facts["output_tokens_mean"] == 4.0


def repeat(total_s: float, cold_start_s: float = 1.0, stream_s: float = 1.0, **more: Any) -> dict[str, Any]:
    """What a process reports whose only request took `total_s`."""
    return {
        "requests": [{"first_s": 0.1, "total_s": total_s, "num_tokens": 5}],
        "prompts": [{"prompt_tokens": 16, "first_s": [0.1, 0.2, 0.3]}],
        "streams": [{"streams": 4, "num_tokens": 256, "seconds": stream_s, "peak_rss_bytes": 9}],
        "cold_start_s": cold_start_s,
        "load_s": 0.5,
        "peak_rss_bytes": 7,
        "peak_rss_bytes_max": 9,
        **more,
    }


def test_repeats_that_agree_are_quiet() -> None:
    facts = summarize_repeats([repeat(0.5), repeat(0.5), repeat(0.51)], noise_threshold=0.1)
    assert (facts["noisy"], facts["noisy_figures"]) == (False, [])
    assert facts["time_to_first_token_by_prompt"] == [
        {"prompt_tokens": 16, "ms_p50": 200.0, "ms_p95": 300.0, "ms_p99": 300.0, "spread": 0.0}
    ]
    assert facts["decode_by_streams"] == [{"streams": 4, "tokens_per_s": 256.0, "spread": 0.0, "peak_rss_bytes": 9}]
    assert facts["cold_start_ms"] == 1000.0
    assert "energy_j_per_token" not in facts


def test_repeats_that_differ_are_noisy_and_say_in_what() -> None:
    repeats = [repeat(0.5), repeat(0.5, stream_s=2.0), repeat(0.5, cold_start_s=3.0)]
    facts = summarize_repeats(repeats, noise_threshold=0.1)
    assert facts["noisy"]
    assert facts["noisy_figures"] == ["cold_start_ms", "tokens_per_s of 4 streams"]
    # Mean 5/3 s, standard deviation (n - 1) 1.1547 s.
    assert facts["spread"]["cold_start_ms"] == pytest.approx(0.6928, abs=1e-4)
    assert summarize_repeats(repeats, noise_threshold=0.7)["noisy_figures"] == []


def test_energy_is_that_of_all_tokens_or_absent() -> None:
    counted = [repeat(0.5, energy_j=1.0), repeat(0.5, energy_j=2.0)]
    assert summarize_repeats(counted, 0.1)["energy_j_per_token"] == 0.3
    assert "energy_j_per_token" not in summarize_repeats([counted[0], repeat(0.5)], 0.1)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)
