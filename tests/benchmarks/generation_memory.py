"""Memory of generate_responses while the number of prompts grows.

    python -m tests.benchmarks.generation_memory

The teacher is the tests' tiny model, fine-tuned until it answers, so that what is measured is the step and not a
model. Its answers are short; the likeliest eight tokens of each position are kept. Each size is a process of its own.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from slmops import artifacts
from slmops.records import ROWS, ChatRecord, write_jsonl
from tests.datasets import ACTIONS, DEVICES, chat_record, commands, make_tiny_teacher, write_dataset


def make_teacher(directory: Path) -> Path:
    """The tiny model, after it has learned to answer."""
    from slmops.demo.models import make_tiny_model

    base = make_tiny_model(directory / "base")
    train = write_dataset(directory / "train", commands(256, seed=1))
    validation = write_dataset(directory / "validation", commands(40, seed=2))
    return make_tiny_teacher(base, train, validation, directory / "teacher")


def requests(count: int) -> Iterator[ChatRecord]:
    """Requests of which no two are the same."""
    chance = random.Random(3)
    for number in range(count):
        device, action = chance.choice(DEVICES), chance.choice(ACTIONS)
        yield chat_record(f"turn {action} the {device} {number}", f"{action} {device}", device)


def answer(prompts: Path, teacher: Path, responses: Path) -> None:
    """Run the step, and print a row of the table."""
    from slmops.generate_responses.config import GenerateResponsesConfig
    from slmops.generate_responses.run import run

    started = time.perf_counter()
    config = GenerateResponsesConfig(max_new_tokens=16, logits_top_k=8, dtype="float32")
    facts = run(config, prompts=prompts, teacher=teacher, responses=responses).facts
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"| {facts['num_prompts']:,} | {facts['num_rows']:,} | {seconds:.0f} | {peak:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--one", nargs=3, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        answer(*arguments.one)
        return
    print("| prompts | rows kept | seconds | peak MB |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        teacher = make_teacher(directory)
        for count in arguments.prompts:
            prompts = directory / f"prompts-{count}"
            with artifacts.writing(prompts, kind="chat_dataset", step="prepare_data") as draft:
                draft.facts["num_rows"] = write_jsonl(draft.path / ROWS, requests(count))
            paths = [str(path) for path in (prompts, teacher, directory / f"run-{count}" / "responses")]
            command = [sys.executable, "-m", "tests.benchmarks.generation_memory", "--one", *paths]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
