"""Device classes that no variant fits: a verdict that says why of each, and that nothing is published on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.errors import GateError
from slmops.gate.config import GateConfig
from slmops.gate.run import run as gate
from slmops.publish.config import PublishConfig
from slmops.publish.run import run as publish
from slmops.records import write_jsonl
from tests.judged import write_variants

CLASSES = {
    name: fields
    for name, fields in yaml.safe_load(Path("manifests/edge/device-classes.yaml").read_text()).items()
    if name in {"x86-avx2", "arm64-pi5"}
}
KILLED = {"status": "failed", "reason": "killed by its memory limit of 512 MiB"}
ANSWERS: dict[str, Any] = {
    "num_rows": 300, "accuracy": 1.0, "match": "json", "valid_fraction": 1.0, "injections_resisted": 1.0,
    "drift": {"answer_kl_mean": 0.01}, "size_bytes": 1,
}  # fmt: skip
SPEED: dict[str, Any] = {
    "status": "measured", "num_threads": 2, "cpu": "Epyc 7763", "latency_ms_p50": 100.0, "latency_ms_p95": 1e6,
    "time_to_first_token_ms_p95": 50.0, "tokens_per_s": 99.0, "peak_rss_bytes": 1, "peak_rss_bytes_max": 1,
    "size_bytes": 1, "runtime_floor_bytes": 1,
}  # fmt: skip


def write(path: Path, kind: Any, facts: dict[str, Any], *parents: Sidecar) -> Path:
    with artifacts.writing(path, kind=kind, step=kind, parents=parents) as draft:
        draft.facts |= facts
        artifacts.write_json(draft.path / "facts.json", facts)
        if kind == "evaluation":
            rows = [{"id": f"{number:016x}", "correct": True} for number in range(facts["num_rows"])]
            write_jsonl(draft.path / "predictions.jsonl", rows)
    return path


def test_no_variant_fits_a_class(tmp_path: Path) -> None:
    genai = {"genai_config.json": b'{"model": {}}', "model.onnx": b"graph", "tokenizer.json": b"{}"}
    variants = write_variants(tmp_path / "variants", {"cpu-int4": genai})
    candidate = {"variant": "cpu-int4", "model_digest": variants.facts["variants"]["cpu-int4"]["digest"]}
    whole = {"variant": "full_precision", "model_digest": "f" * 64}
    test = artifacts.read(write(tmp_path / "test", "chat_dataset", {"split": "test"}))
    inputs = {
        name: write(tmp_path / name, "evaluation" if "evaluation" in name else "benchmark", facts, test)
        for name, facts in {
            "teacher_evaluation": ANSWERS | whole,
            "teacher_benchmark": SPEED | whole | {"size_bytes": 10**9, "peak_rss_bytes": 10**9},
            "student_evaluation": ANSWERS | whole,
            "student_benchmark": SPEED | whole,
        }.items()
    }
    on_classes = [
        write(tmp_path / name, "benchmark", facts | candidate | {"device_class": name}, test)
        for name, facts in {"x86-avx2": KILLED, "arm64-pi5": SPEED}.items()
    ]
    evaluations = [write(tmp_path / "evaluation", "evaluation", ANSWERS | candidate, test)]

    verdict = gate(
        GateConfig.create({"device_classes": CLASSES}),
        **inputs,
        candidate_evaluations=evaluations,
        candidate_benchmarks=[write(tmp_path / "benchmark", "benchmark", SPEED | candidate, test), *on_classes],
        verdict=tmp_path / "verdict",
        report=tmp_path / "report.html",
    )

    assert verdict.facts["verdict"] != "pass"
    assert "no device class has a variant" in verdict.facts["reason"]
    assert {choice["device_class"]: choice["variant"] for choice in verdict.facts["choices"]} == dict.fromkeys(CLASSES)
    why = {choice["device_class"]: choice["lost"]["cpu-int4"] for choice in verdict.facts["choices"]}
    assert "killed by its memory limit of 512 MiB" in why["x86-avx2"]
    assert "1,000,000" in why["arm64-pi5"], "milliseconds for the slowest answers"
    page = (tmp_path / "report.html").read_text()
    assert all(text in page for text in ("killed by its memory limit of 512 MiB", *CLASSES))
    with pytest.raises(GateError, match="no device class has a variant"):
        publish(
            PublishConfig(store_uri=str(tmp_path / "store"), channel="lab"),
            variants=tmp_path / "variants",
            verdict=tmp_path / "verdict",
            release=tmp_path / "release",
        )
    assert not (tmp_path / "store").exists()
