"""Fixtures that several test folders share: the real things, small."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmops.demo.models import make_tiny_model
from slmops.demo.object_store import ObjectStore, object_store
from slmops.progress import log
from tests.datasets import commands, make_tiny_teacher, write_dataset


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """A command that a test calls in this process, or import-linter, sets logging for the whole process: undo that."""
    yield
    log.handlers.clear()
    log.propagate, log.disabled = True, False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for half a megabyte."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", mount], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield mount
    subprocess.run(["umount", mount], check=True)


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


@pytest.fixture
def bucket(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty bucket on it, which this process may write."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return s3.make_bucket()


@pytest.fixture(scope="session")
def train_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "train", commands(256, seed=1))


@pytest.fixture(scope="session")
def held_out_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "test", commands(40, seed=2))


@pytest.fixture(scope="session")
def tiny_teacher(
    tiny_model: Path, train_rows: Path, held_out_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_tiny_teacher(tiny_model, train_rows, held_out_rows, tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def tiny_responses(tiny_teacher: Path, train_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher's answers, with the eight likeliest tokens of each position at temperature 2."""
    from slmops.generate_responses.config import GenerateResponsesConfig
    from slmops.generate_responses.run import run

    config = GenerateResponsesConfig(max_new_tokens=16, logits_top_k=8, logits_temperature=2.0, dtype="float32")
    path = tmp_path_factory.mktemp("data") / "responses"
    run(config, prompts=train_rows, teacher=tiny_teacher, responses=path)
    return path
