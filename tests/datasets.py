"""Small data sets for tests, written as the artifacts that steps take."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from slmops import artifacts
from slmops.records import ROWS, ChatRecord, Message, write_jsonl

DEVICES = ("light", "fan", "tv", "door")
ACTIONS = ("on", "off")


def chat_record(prompt: str, completion: str, stratum: str = "") -> ChatRecord:
    """A conversation of two turns."""
    return ChatRecord(
        id=hashlib.sha256(f"{prompt}\n{completion}".encode()).hexdigest()[:16],
        messages=(Message(role="user", content=prompt), Message(role="assistant", content=completion)),
        stratum=stratum,
    )


def commands(num_rows: int, seed: int = 0) -> list[ChatRecord]:
    """Requests that a random model of a few hundred thousand parameters learns to answer within seconds."""
    chance = random.Random(seed)
    records: dict[str, ChatRecord] = {}
    while len(records) < num_rows:
        device, action = chance.choice(DEVICES), chance.choice(ACTIONS)
        record = chat_record(f"turn {action} the {device} {chance.randint(0, 999)}", f"{action} {device}", device)
        records[record.id] = record
    return list(records.values())


def make_tiny_teacher(base: Path, train: Path, validation: Path, path: Path) -> Path:
    """The tiny model at `base` after fine-tuning: it answers most requests right."""
    from slmops.finetune.config import FinetuneConfig
    from slmops.finetune.run import run

    config = FinetuneConfig(method="full", learning_rate=3e-3, num_epochs=3, dtype="float32")
    run(config, train=train, validation=validation, base=base, model=path)
    return path


def write_dataset(path: Path, records: list[ChatRecord]) -> Path:
    """A chat_dataset artifact with these rows."""
    with artifacts.writing(path, kind="chat_dataset", step="prepare_data") as draft:
        draft.facts["num_rows"] = write_jsonl(draft.path / ROWS, records)
    return path
