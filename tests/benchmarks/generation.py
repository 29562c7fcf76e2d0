"""Answers to prompts on a CPU: our engine beside `transformers.generate` at its own best batch size.

    python -m tests.benchmarks.generation [--model DIRECTORY --rows DIRECTORY/rows.jsonl]

Without them, the teacher and the prompts of the last `make demo` are taken; where there was none, SmolLM2 itself, which
has not learned to answer them.

Each side runs in a process of its own, as a user would run it, and they take turns: the peer, ours without drafts, with
drafts, and with log-probabilities kept. What is reported is the median of the ratios within a round, so that other load
on the machine falls on both; with two compute types, ours in the last is also set beside the peer in the first.

The peer answers prompts sorted by length (all of them, which spares it padding), at the batch size that was fastest for
it in a first pass over a sample. Ours takes them as they come.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PEER_BATCH_SIZES = (32, 64, 128, 256)
MAX_NEW_TOKENS = 64
TOP_K = 64
DEMO = Path(".work/demo")
MODES = {"plain": "ours", "drafts": "ours, labels as drafts", "logits": f"ours, top {TOP_K} kept"}

Answers = dict[int, list[int]]


def read_conversations(path: Path, count: int) -> list[list[dict[str, str]]]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["messages"] for _, line in zip(range(count), lines, strict=False)]


def teacher_of_the_demo() -> tuple[Path, Path]:
    """Model and rows of the last run of the demo, or SmolLM2 and the demo's prompts."""
    from slmops.demo.building_commands import make_rows
    from slmops.demo.models import fetch_smollm2
    from slmops.demo.run import SYSTEM_PROMPT

    runs = sorted(DEMO.glob("full/run/artifacts/*/finetune/model/slmops.json"), key=lambda path: path.stat().st_mtime)
    for run in (path.parents[2] for path in reversed(runs)):
        if (rows := run / "prepare-data/train/rows.jsonl").is_file():
            return run / "finetune/model", rows
    print(f"no teacher below {DEMO}; taking SmolLM2 as it is", file=sys.stderr)
    rows = DEMO / "prompts.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    with open(rows, "w", encoding="utf-8") as lines:
        for row in make_rows(2000):
            turns = (("system", SYSTEM_PROMPT), ("user", row["request"]), ("assistant", row["command"]))
            lines.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return fetch_smollm2(DEMO / "models"), rows


class Peer:
    """transformers' own generate."""

    def __init__(self, model: Path, conversations: Sequence[list[dict[str, str]]], dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.prompts = [
            self.tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
            for turns in conversations
        ]

    def answer(self, batch_size: int, numbers: Sequence[int]) -> Answers:
        import torch

        order = sorted(numbers, key=lambda number: len(self.tokenizer(self.prompts[number])["input_ids"]))
        found: Answers = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = self.tokenizer(
                [self.prompts[number] for number in batch], return_tensors="pt", padding=True, add_special_tokens=False
            )
            with torch.inference_mode():
                output = self.model.generate(
                    **inputs,
                    max_new_tokens=MAX_NEW_TOKENS,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            end = self.tokenizer.eos_token_id
            for number, row in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                found[number] = row[: row.index(end) + 1] if end in row else row
        return found


class Ours:
    """TransformersTeacher."""

    def __init__(self, model: Path, conversations: Sequence[list[dict[str, str]]], dtype: str) -> None:
        from slmops.teachers.interface import Decoding
        from slmops.teachers.transformers_teacher import TransformersTeacher

        self.conversations = conversations
        self.teacher = TransformersTeacher(
            "ours", Decoding(MAX_NEW_TOKENS), directory=model, batch_size=max(PEER_BATCH_SIZES), dtype=dtype
        )

    def answer(self, mode: str, numbers: Sequence[int]) -> Answers:
        from dataclasses import replace

        from slmops.teachers.interface import Answer, Question

        top_k = TOP_K if mode == "logits" else 0
        self.teacher.decoding = replace(self.teacher.decoding, logits_top_k=top_k)
        asked = [
            Question(
                f"{number:032x}",
                tuple(self.conversations[number][:-1]),
                number,
                self.conversations[number][-1]["content"] if mode == "drafts" else "",
            )
            for number in numbers
        ]
        found: Answers = {}
        for question, answer in self.teacher.answer(asked):
            assert isinstance(answer, Answer)
            found[int(question.key, 16)] = list(answer.token_ids)
        return found


def serve(connection: Connection, side: str, model: Path, rows: Path, count: int, dtype: str, threads: int) -> None:
    """Answer as told, until told nothing more."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    conversations = read_conversations(rows, count)
    worker: Any = (Peer if side == "peer" else Ours)(model, conversations, dtype)
    connection.send(None)
    while (task := connection.recv()) is not None:
        how, numbers = task
        started = time.perf_counter()
        answers = worker.answer(how, numbers)
        connection.send((time.perf_counter() - started, answers))


@contextmanager
def worker(*arguments: Any) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, *arguments), daemon=True)
    process.start()
    here.recv()
    yield here
    here.send(None)
    process.join()


def ask(connection: Connection, how: object, numbers: Sequence[int]) -> tuple[float, Answers]:
    connection.send((how, list(numbers)))
    seconds, answers = connection.recv()
    return seconds, answers


def best_batch_size(peer: Connection, count: int, dtype: str) -> int:
    """The peer's fastest, by a sample of prompts of all lengths; large batches have two passes of their own size."""
    rates = {}
    ask(peer, 8, range(8))  # what is allocated once
    for size in PEER_BATCH_SIZES:
        sample = range(min(count, max(8, 2 * size)))
        seconds, _ = ask(peer, size, sample)
        rates[size] = len(sample) / seconds
        print(
            f"{dtype}: transformers.generate, batches of {size}: {rates[size]:.2f} prompts/s",
            file=sys.stderr,
            flush=True,
        )
    return max(rates, key=lambda size: rates[size])


def measure(options: argparse.Namespace) -> list[str]:
    """Rows of the table. Every round has all sides once, one behind the other."""
    numbers = range(options.prompts)
    seconds: dict[tuple[str, str], list[float]] = {}
    answers: dict[tuple[str, str], Answers] = {}
    with ExitStack() as stack:
        workers = {
            (side, dtype): stack.enter_context(
                worker(side, options.model, options.rows, options.prompts, dtype, options.threads)
            )
            for dtype in options.dtype
            for side in ("peer", "ours")
        }
        sizes = {dtype: best_batch_size(workers["peer", dtype], options.prompts, dtype) for dtype in options.dtype}
        for dtype in options.dtype:
            ask(workers["ours", dtype], "plain", range(8))
        for round_ in range(options.rounds):
            for dtype in options.dtype:
                for how in ("peer", *MODES):
                    side, told = ("peer", sizes[dtype]) if how == "peer" else ("ours", how)
                    took, answers[how, dtype] = ask(workers[side, dtype], told, numbers)
                    seconds.setdefault((how, dtype), []).append(took)
                rates = [f"{how} {options.prompts / seconds[how, dtype][-1]:.2f}" for how in ("peer", *MODES)]
                print(f"{dtype}, round {round_ + 1}: {', '.join(rates)} prompts/s", file=sys.stderr, flush=True)

    def line(how: str, dtype: str, base: tuple[str, str]) -> str:
        ratios = [one / other for one, other in zip(seconds[base], seconds[how, dtype], strict=True)]
        same = sum(answers[how, dtype][number] == answers[base][number] for number in numbers) / len(numbers)
        speed = options.prompts / statistics.median(seconds[how, dtype])
        name = f"`transformers.generate`, batches of {sizes[dtype]}" if how == "peer" else MODES[how]
        times = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if how != "peer" else "1"
        return f"| {base[1]} | {dtype} | {name} | {speed:.2f} | {times} | {same:.1%} |"

    lines = [line(how, dtype, ("peer", dtype)) for dtype in options.dtype for how in ("peer", *MODES)]
    if len(options.dtype) > 1:
        first, last = options.dtype[0], options.dtype[-1]
        lines += [line(how, last, ("peer", first)) for how in MODES]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face directory")
    parser.add_argument("--rows", type=Path, help="chat records, rows.jsonl")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    if options.model is None or options.rows is None:
        options.model, options.rows = teacher_of_the_demo()
    lines = measure(options)
    print("| peer in | in | | prompts/s | times the peer | same answer |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
