"""Kept logits: small, mapped, tied to tokenizer and template, and refused when damaged."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from slmops import models
from slmops.cached_logits import (
    RECORDS,
    ROW_STARTS,
    CachedLogitsWriter,
    LogitsInfo,
    merge_cached_logits,
    open_cached_logits,
    record_dtype,
)
from slmops.errors import ArtifactError, ModelError

TOKENIZER, TEMPLATE, TEACHER = "1" * 64, "2" * 64, "3" * 64


def info(k: int = 4, temperature: float = 2.0) -> LogitsInfo:
    return LogitsInfo(
        k=k, temperature=temperature, tokenizer_digest=TOKENIZER, template_digest=TEMPLATE, teacher_digest=TEACHER
    )


def some_records(num_tokens: int, k: int = 4, seed: int = 0) -> np.ndarray:
    chance = np.random.default_rng(seed)
    records = np.empty(num_tokens, record_dtype(k))
    records["top_ids"] = chance.integers(0, 50_000, (num_tokens, k))
    records["top_log_probs"] = -chance.random((num_tokens, k))
    records["tail_log_prob"] = -chance.random(num_tokens)
    return records


def write(directory: Path, rows: list[np.ndarray], k: int = 4) -> Path:
    directory.mkdir()
    with CachedLogitsWriter(directory, info(k)) as writer:
        for records in rows:
            writer.append(records)
    return directory


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    rows = [some_records(n, seed=n) for n in (3, 0, 5, 1)]
    cached = open_cached_logits(write(tmp_path / "a", rows), 4)
    assert cached.row_starts.tolist() == [0, 3, 3, 8, 9]
    np.testing.assert_array_equal(cached.records, np.concatenate(rows))
    assert isinstance(cached.records, np.memmap)
    assert np.shares_memory(cached.top_ids, cached.records), "columns are views, nothing is copied"
    assert cached.info.temperature == 2.0


def test_64_log_probabilities_take_at_most_400_bytes_a_token(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", [some_records(50, k=64) for _ in range(40)], k=64)
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert size / 2000 <= 400
    assert (directory / RECORDS).stat().st_size == 2000 * 388


def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    records = some_records(20, k=64)
    directory = tmp_path / "a"
    directory.mkdir()
    with CachedLogitsWriter(directory, info(64)) as writer:
        writer.append(records)
        tracemalloc.start()
        for _ in range(3000):
            writer.append(records)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 200_000
    assert len(open_cached_logits(directory, 3001).records) == 60_020


@pytest.mark.parametrize("name", [RECORDS, ROW_STARTS])
def test_a_short_file_is_refused(tmp_path: Path, name: str) -> None:
    directory = write(tmp_path / "a", [some_records(2), some_records(3)])
    (directory / name).write_bytes((directory / name).read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=rf"{name} has \d+ bytes, logits.json says \d+ bytes"):
        open_cached_logits(directory, 2)


def test_damaged_or_missing_descriptions_are_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", [some_records(2)])
    with pytest.raises(ArtifactError, match="are of 1 rows, and do not fit its 7 rows"):
        open_cached_logits(directory, 7)
    starts = np.load(directory / ROW_STARTS)
    np.save(directory / ROW_STARTS, starts + 1)
    with pytest.raises(ArtifactError, match=r"does not fit logits\.json"):
        open_cached_logits(directory, 1)
    (directory / "logits.json").write_text('{"k": "many"}')
    with pytest.raises(ArtifactError, match=r"logits\.json: k: "):
        open_cached_logits(directory, 1)
    (directory / "logits.json").unlink()
    with pytest.raises(ArtifactError, match="half-written"):
        open_cached_logits(directory, 1)


def test_a_writer_that_fails_leaves_nothing_that_can_be_read(tmp_path: Path) -> None:
    def interrupted() -> None:
        with CachedLogitsWriter(tmp_path, info()) as writer:
            writer.append(some_records(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ArtifactError, match="half-written"):
        open_cached_logits(tmp_path, 1)


def test_shards_are_merged_in_order(tmp_path: Path) -> None:
    rows = [some_records(n, seed=n) for n in (3, 1, 4, 1, 5)]
    parts = [write(tmp_path / "0", rows[:2]), write(tmp_path / "1", []), write(tmp_path / "2", rows[2:])]
    whole = write(tmp_path / "whole", rows)
    (tmp_path / "merged").mkdir()
    merge_cached_logits(parts, tmp_path / "merged")
    for path in whole.iterdir():
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes()


def test_shards_of_different_teachers_are_not_merged(tmp_path: Path) -> None:
    first = write(tmp_path / "0", [some_records(2)])
    (tmp_path / "1").mkdir()
    with CachedLogitsWriter(tmp_path / "1", info(temperature=1.0)) as writer:
        writer.append(some_records(2))
    (tmp_path / "merged").mkdir()
    with pytest.raises(ArtifactError, match=r"1 and .*0 differ in temperature"):
        merge_cached_logits([first, tmp_path / "1"], tmp_path / "merged")


def test_the_template_has_a_digest_of_its_own_wherever_it_is_kept(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    kept_in_file = models.template_digest(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert models.template_digest(tmp_path) == kept_in_file
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }} "}')
    assert models.template_digest(tmp_path) != kept_in_file
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no chat template"):
        models.template_digest(tmp_path)
