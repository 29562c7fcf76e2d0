"""benchmark: figures of a real process, and of known timings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops import artifacts
from slmops.benchmark.config import BenchmarkConfig
from slmops.benchmark.run import percentile, run, summarize
from slmops.errors import ModelError


def test_a_quantized_variant_is_measured_in_a_process_without_torch(
    tiny_variants: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    config = BenchmarkConfig(variant="cpu-int4", num_requests=4, num_warmup=1, max_new_tokens=8)
    facts = run(config, model=tiny_variants, prompts=held_out_rows, benchmark=tmp_path / "benchmark").facts
    variant = artifacts.read(tiny_variants).facts["variants"]["cpu-int4"]
    assert facts["model_digest"] == variant["digest"]
    assert 0 < facts["time_to_first_token_ms_p50"] <= facts["latency_ms_p50"] <= facts["latency_ms_p95"]
    assert facts["num_requests"] == 4
    assert facts["tokens_per_s"] > 0
    # A process that had imported torch would hold far more than the runtime and this model do.
    assert 0 < facts["runtime_floor_bytes"] < facts["peak_rss_bytes"] * 1.2 < 200e6


def test_a_full_precision_model_is_measured_too(tiny_model: Path, held_out_rows: Path, tmp_path: Path) -> None:
    config = BenchmarkConfig(num_requests=2, num_warmup=0, max_new_tokens=8)
    facts = run(config, model=tiny_model, prompts=held_out_rows, benchmark=tmp_path / "benchmark").facts
    assert facts["runtime"].startswith("transformers ")
    assert facts["output_tokens_mean"] > 0


def test_a_process_that_dies_is_an_error_with_its_last_words(
    tiny_variants: Path, held_out_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmops.benchmark.run.sys.executable", "/bin/false")
    config = BenchmarkConfig(variant="cpu-int4", num_requests=1)
    with pytest.raises(ModelError, match="ended with code 1: no message"):
        run(config, model=tiny_variants, prompts=held_out_rows, benchmark=tmp_path / "benchmark")
    assert not (tmp_path / "benchmark").exists()


def test_known_timings_give_known_figures() -> None:
    facts = summarize(
        [{"first_s": 0.1, "total_s": 0.5, "num_tokens": 5}, {"first_s": 0.1, "total_s": 0.3, "num_tokens": 3}]
    )
    assert facts["latency_ms_p50"] == 400.0
    assert facts["tokens_per_s"] == 10.0
    assert facts["output_tokens_mean"] == 4.0


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)
