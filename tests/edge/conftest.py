"""A store and a node with the tiny quantized model on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmops import artifacts
from slmops.edge.pull import pull
from slmops.publish.config import PublishConfig
from slmops.publish.run import run


@pytest.fixture(scope="session")
def tiny_store(tiny_variants: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to which the tiny model was published, channel `default`."""
    base = tmp_path_factory.mktemp("tiny-store")
    variants = artifacts.expect(tiny_variants, "variants")
    digest = variants.facts["variants"]["cpu-int4"]["digest"]
    with artifacts.writing(base / "b", kind="benchmark", step="benchmark", parents=[variants]) as benchmark:
        (benchmark.path / "benchmark.json").write_text("{}")
        benchmark.facts.update(model_digest=digest, runtime="onnxruntime-genai 0.10.0", peak_rss_bytes=100_000_000)
    assert benchmark.sidecar is not None
    with artifacts.writing(base / "v", kind="verdict", step="gate", parents=[benchmark.sidecar]) as verdict:
        (verdict.path / "verdict.json").write_text("{}")
        verdict.facts.update(verdict="pass", reason="all hold", variant="cpu-int4", candidate_digest=digest)
    config = PublishConfig(store_uri=str(base / "store"))
    run(config, variants=tiny_variants, verdict=base / "v", release=base / "release")
    return base / "store"


@pytest.fixture(scope="session")
def tiny_node(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node that has pulled it. Tests only read it."""
    root = tmp_path_factory.mktemp("tiny-node")
    assert pull(str(tiny_store), "default", root).switched
    return root
