"""Fixtures that several test folders share: the real things, small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slmops.demo.models import make_tiny_model
from slmops.demo.object_store import ObjectStore, object_store


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few hundred thousand random parameters with a byte-level tokenizer, as a Hugging Face directory."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_variants(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model quantized by the real step: a variants artifact with `cpu-int4`."""
    from slmops.quantize.config import QuantizeConfig
    from slmops.quantize.run import run

    path = tmp_path_factory.mktemp("quantized") / "variants"
    run(QuantizeConfig(), model=tiny_model, variants=path)
    return path


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server on loopback; each test takes a bucket of its own with `s3.make_bucket()`."""
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        yield store
