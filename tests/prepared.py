"""prepare_data run on small files that a test writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from slmops.prepare_data.config import PrepareDataConfig
from slmops.prepare_data.run import PreparedData, run
from slmops.prepare_data.splitting import SPLITS
from slmops.records import ChatRecord, read_records

WORDS = [a + b + c for a in "bdfgklmnprst" for b in ("a", "e", "i", "or", "un") for c in ("ra", "ko", "ti", "le", "s")]


def prepare(tmp_path: Path, source: Path | str, **settings: Any) -> PreparedData:
    """Run the step into `tmp_path/out`."""
    config = PrepareDataConfig.create({"source_uri": str(source), **settings})
    paths = {split: tmp_path / "out" / split for split in SPLITS}
    return run(config, **paths, report=tmp_path / "out" / "report.html")


def records(tmp_path: Path, split: str) -> list[ChatRecord]:
    return read_records(tmp_path / "out" / split)


def all_records(tmp_path: Path) -> list[ChatRecord]:
    return [record for split in SPLITS for record in records(tmp_path, split)]


def prompts(tmp_path: Path, split: str) -> set[str]:
    return {record.prompt[-1]["content"] for record in records(tmp_path, split)}


def set_aside(tmp_path: Path, name: str = "set_aside.jsonl") -> list[dict[str, str]]:
    """Rows that were set aside, as the train artifact lists them."""
    path = tmp_path / "out" / "train" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sentences(count: int, num_words: int = 30, seed: int = 0) -> list[str]:
    """Different texts that share no five words in a row."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=num_words)) for _ in range(count)]
