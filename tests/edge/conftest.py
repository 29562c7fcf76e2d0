"""A store and a node with the tiny quantized model on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmops import artifacts
from slmops.edge.pull import pull
from slmops.publish.config import PublishConfig
from slmops.publish.run import run
from tests.judged import write_verdict


@pytest.fixture(scope="session")
def tiny_store(tiny_variants: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to which the tiny model was published, channel `default`."""
    base = tmp_path_factory.mktemp("tiny-store")
    verdict = write_verdict(base / "verdict", artifacts.expect(tiny_variants, "variants"))
    config = PublishConfig(store_uri=str(base / "store"))
    run(config, variants=tiny_variants, verdict=verdict, release=base / "release")
    return base / "store"


@pytest.fixture(scope="session")
def tiny_node(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node that has pulled it. Tests only read it."""
    root = tmp_path_factory.mktemp("tiny-node")
    assert pull(str(tiny_store), "default", root).switched
    return root
