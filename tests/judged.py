"""Quantized variants and the gate's verdict on them, as the real steps write them, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from slmops import artifacts
from slmops.artifacts import Sidecar

CANDIDATE = "cpu-int4"


def write_variants(path: Path, variants: Mapping[str, Mapping[str, bytes]]) -> Sidecar:
    """A variants artifact with these files, by name of variant and of file."""
    with artifacts.writing(path, kind="variants", step="quantize") as draft:
        built = {}
        for name, files in variants.items():
            (draft.path / name).mkdir()
            for file, content in files.items():
                (draft.path / name / file).write_bytes(content)
            entries = list(artifacts.list_files(draft.path / name))
            built[name] = {"digest": artifacts.digest_of(entries), "size_bytes": sum(e.size_bytes for e in entries)}
        draft.facts["variants"] = built
    return draft.sidecar


def write_verdict(path: Path, variants: Sidecar, *, verdict: str = "pass", digest: str | None = None) -> Path:
    """A verdict on the candidate of `variants`, or on another with `digest`, with a benchmark as its parent."""
    candidate = digest or variants.facts["variants"][CANDIDATE]["digest"]
    with artifacts.writing(
        path.with_name("benchmark"), kind="benchmark", step="benchmark", parents=[variants]
    ) as benchmark:
        benchmark.facts.update(model_digest=candidate, runtime="onnxruntime-genai 0.10.0", peak_rss_bytes=1_000_000)
    with artifacts.writing(path, kind="verdict", step="gate", parents=[benchmark.sidecar]) as judged:
        judged.facts.update(verdict=verdict, reason="accuracy 0.5 < 0.9", variant=CANDIDATE, candidate_digest=candidate)
    return path
