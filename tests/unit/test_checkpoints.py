"""Checkpoints: a kill leaves the last or the one before, in a folder and on S3, and what is damaged is not believed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch

from slmops.errors import ArtifactError, DiskFullError, StoreError
from slmops.finetune.config import FinetuneConfig
from slmops.storage import open_store
from slmops.training.checkpoints import IN_WORK_DIR, MANIFEST, Checkpoints

CPU = torch.device("cpu")


def state(value: float, size: int = 1000) -> dict[str, object]:
    return {"weights": {"w": torch.full((size,), value)}}


def value_of(checkpoints: Checkpoints) -> tuple[float, int]:
    found = checkpoints.load(CPU)
    assert found is not None
    return found[0]["weights"]["w"][0].item(), found[1]


@pytest.fixture(params=["folder", "another folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A work directory, and where its checkpoints lie."""
    work_dir = tmp_path / "train-0123.work"
    work_dir.mkdir()
    if request.param == "s3":
        return work_dir, f"{request.getfixturevalue('bucket')}/checkpoints"
    return work_dir, IN_WORK_DIR if request.param == "folder" else str(tmp_path / "elsewhere")


def test_the_last_one_is_loaded_and_those_before_are_gone(place: tuple[Path, str]) -> None:
    work_dir, uri = place
    assert Checkpoints(work_dir, uri).load(CPU) is None
    checkpoints = Checkpoints(work_dir, uri)
    checkpoints.save(state(1.0), 10)
    checkpoints.save(state(2.0), 20)
    assert value_of(Checkpoints(work_dir, uri)) == (2.0, 20)
    assert [path.name for path in work_dir.glob("*.pt")] == ["checkpoint-20.pt"]
    if uri != IN_WORK_DIR:
        # A pod that starts anew has an empty work directory.
        for path in work_dir.iterdir():
            path.unlink()
        assert value_of(Checkpoints(work_dir, uri)) == (2.0, 20)
        stored = {key.rpartition("/")[2] for key in open_store(uri).list("train-0123.work/")}
        assert stored == {"checkpoint-20.pt", MANIFEST}
        checkpoints.remove()
        assert list(open_store(uri).list("train-0123.work/")) == []


def test_a_kill_before_the_manifest_leaves_the_one_before(place: tuple[Path, str]) -> None:
    work_dir, uri = place
    checkpoints = Checkpoints(work_dir, uri)
    checkpoints.save(state(1.0), 10)
    (work_dir / "checkpoint-20.pt").write_bytes(b"half")
    if uri != IN_WORK_DIR:
        open_store(uri).create("train-0123.work/checkpoint-20.pt", b"half")
    assert value_of(Checkpoints(work_dir, uri)) == (1.0, 10)
    checkpoints.save(state(2.0), 20)
    assert value_of(Checkpoints(work_dir, uri)) == (2.0, 20)


def test_the_one_that_the_manifest_names_is_not_written_over(place: tuple[Path, str]) -> None:
    """A kill while the last step's checkpoint is written again would leave none."""
    work_dir, uri = place
    checkpoints = Checkpoints(work_dir, uri)
    checkpoints.save(state(1.0), 10)
    checkpoints.save(state(2.0), 10)
    resumed = Checkpoints(work_dir, uri)
    assert value_of(resumed) == (1.0, 10)
    resumed.save(state(3.0), 10)
    assert value_of(Checkpoints(work_dir, uri)) == (1.0, 10)
    assert [path.name for path in work_dir.iterdir() if path.is_dir()] == []


def test_one_that_is_cut_short_flipped_or_gone_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1.0), 10)
    path = tmp_path / "checkpoint-10.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match=rf"has {len(whole) - 100:,} bytes, .* remove {tmp_path} to start over"):
        checkpoints.load(CPU)
    path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with pytest.raises(ArtifactError, match="does not have the checksum"):
        checkpoints.load(CPU)
    path.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        checkpoints.load(CPU)


def test_one_of_other_settings_or_with_a_broken_manifest_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "train-01.work", tmp_path / "train-02.work"
    first.mkdir()
    Checkpoints(first).save(state(1.0), 10)
    first.rename(second)
    with pytest.raises(ArtifactError, match=r"belongs to train-01\.work: other settings or inputs"):
        Checkpoints(second).load(CPU)
    manifest = json.loads((second / MANIFEST).read_text())
    (second / MANIFEST).write_text(json.dumps(manifest | {"file": "../../etc/passwd"}))
    with pytest.raises(ArtifactError, match="is no manifest of a checkpoint"):
        Checkpoints(second).load(CPU)


def test_a_full_disk_leaves_the_one_before(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(state(1.0), 10)
    with pytest.raises(DiskFullError, match=r"no space left while writing .*checkpoint-20\.pt"):
        checkpoints.save(state(2.0, size=1_000_000), 20)
    assert not (small_disk / "checkpoint-20.pt").exists()
    assert value_of(Checkpoints(small_disk)) == (1.0, 10)


def test_a_place_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"s3://bucket/prefix or a local folder, found gs://"):
        Checkpoints(tmp_path, "gs://bucket")


def train(config: FinetuneConfig, train_rows: Path, held_out_rows: Path, base: Path, model: Path) -> None:
    """In a process of its own."""
    from slmops.finetune.run import run

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    run(config, train=train_rows, validation=held_out_rows, base=base, model=model)


NUM_KILLS = 20


@pytest.mark.slow
def test_twenty_kills_at_random_points_change_nothing(
    tiny_model: Path, train_rows: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    """SIGKILL, wherever the process is: in a step, in a checkpoint, in saving the model."""
    from slmops import artifacts

    config = FinetuneConfig(
        lora_dropout=0.1, num_epochs=12, batch_size=8, checkpoint_interval_s=0.05, learning_rate=5e-3, dtype="float32"
    )
    # A server that has torch loaded forks each process, so that a start takes no ten seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slmops.finetune.run"])
    paths = (train_rows, held_out_rows, tiny_model)
    whole = context.Process(target=train, args=(config, *paths, tmp_path / "whole"))
    whole.start()
    whole.join()
    expected = artifacts.read(tmp_path / "whole").facts

    chance = random.Random(0)
    kills = 0
    while not (tmp_path / "killed").exists():
        process = context.Process(target=train, args=(config, *paths, tmp_path / "killed"))
        process.start()
        if kills < NUM_KILLS:
            time.sleep(0.2 + chance.random() * 0.7)
            process.kill()
            kills += 1
        process.join()
    found = artifacts.read(tmp_path / "killed").facts
    assert kills == NUM_KILLS
    assert found["num_steps"] == expected["num_steps"] == 384
    torch.testing.assert_close(found["loss_curve"], expected["loss_curve"], rtol=0, atol=1e-3)
    assert found["final_loss"] == pytest.approx(expected["final_loss"], abs=1e-3)
