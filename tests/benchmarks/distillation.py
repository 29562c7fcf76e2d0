"""Distilling on a CPU: ours beside TRL's GKDTrainer and a plain subclass of transformers' Trainer.

    python -m tests.benchmarks.distillation --peer PYTHON [--model DIRECTORY --rows DIRECTORY/rows.jsonl]

PYTHON is that of an environment with `trl`; the teacher and the prompts are those of the last `make demo` unless named.
The teacher answers the prompts once; every side then gets the same student (6 of its layers), answers, batch size,
number of steps and schedule, in a process of its own, in turns. Real tokens are those that are not padding, counted
once for all sides. What came out is judged by one function for all: forward KL to the teacher, and cross-entropy, on
answers that no side was trained on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.generation import teacher_of_the_demo

HERE = Path(__file__).parent
KEEP_LAYERS = {30: [0, 6, 12, 18, 24, 29]}
LEARNING_RATE = 1e-3
MAX_LENGTH = 128
TOP_K = 64
WARMUP_FRACTION = 0.05
SIDES = {
    "trl": "TRL's GKDTrainer",
    "plain": "`Trainer` subclass",
    "online": "ours, teacher online",
    "cached": f"ours, cached top {TOP_K}",
}


@dataclass(frozen=True)
class Result:
    """What one side did in one turn."""

    tokens_per_s: float
    peak_rss_bytes: int
    kl: float
    """Forward KL to the teacher on held-out answers, nats per token."""
    cross_entropy: float


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Answers of the teacher with their likeliest tokens, the student before training, and the held-out answers."""
    import torch

    from slmops import torch_models
    from slmops.generate_responses.config import GenerateResponsesConfig
    from slmops.generate_responses.run import run as generate
    from slmops.records import ChatRecord
    from slmops.shaping.plan import StudentPlan
    from slmops.shaping.student import shape_student
    from tests.datasets import write_dataset

    num_train = options.steps * options.batch_size
    with open(options.rows, encoding="utf-8") as lines:
        records = [
            ChatRecord.model_validate_json(line) for line in itertools.islice(lines, num_train + options.held_out)
        ]
    config = GenerateResponsesConfig(max_new_tokens=64, logits_top_k=TOP_K)
    for name, part in (("train", records[:num_train]), ("held_out", records[num_train:])):
        write_dataset(folder / f"{name}_prompts", part)
        generate(config, prompts=folder / f"{name}_prompts", teacher=options.model, responses=folder / name)
    teacher = torch_models.load_model(options.model, dtype=torch.float32, device=torch.device("cpu"))
    layers = KEEP_LAYERS.get(teacher.config.num_hidden_layers, [0, teacher.config.num_hidden_layers - 1])
    student, _ = shape_student(teacher, StudentPlan(keep_layers=layers), None, 0)
    torch_models.save_model(student, torch_models.load_tokenizer(options.model), folder / "student")


def train_ours(task: dict[str, Any]) -> None:
    """One turn of ours, as the step's own process runs it."""
    from slmops import artifacts
    from slmops.distill.config import DistillConfig
    from slmops.distill.run import run
    from slmops.hardware import peak_memory_bytes

    num_rows = artifacts.read(Path(task["responses"])).facts["num_rows"]
    config = DistillConfig(
        teacher_logits=task["teacher_logits"],
        num_epochs=task["steps"] * task["batch_size"] / num_rows,
        batch_size=task["batch_size"],
        micro_batch_size=task["batch_size"],
        learning_rate=LEARNING_RATE,
        warmup_fraction=WARMUP_FRACTION,
        max_length=MAX_LENGTH,
        dtype=task["dtype"],
        seed=task["seed"],
        num_validations=2,
        max_validation_rows=1,
        checkpoint_interval_s=3600,
    )
    import torch

    sidecar = run(
        config,
        responses=Path(task["responses"]),
        validation=Path(task["validation"]),
        teacher=Path(task["teacher"]),
        student=Path(task["student"]),
        model=Path(task["model"]),
    )
    print(
        json.dumps(
            {
                "seconds": sidecar.facts["num_tokens"] / sidecar.facts["tokens_per_s"],
                "peak_rss_bytes": peak_memory_bytes(torch.device("cpu")),
            }
        )
    )


def trainer_arguments(options: argparse.Namespace, seed: int, dtype: str) -> dict[str, Any]:
    """What both peers tell transformers' Trainer: our optimizer and schedule, and nothing that only costs time."""
    return {
        "per_device_train_batch_size": options.batch_size,
        "max_steps": options.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": math.ceil(WARMUP_FRACTION * options.steps),
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": seed,
        "bf16": dtype == "bfloat16",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def turn(side: str, seed: int, dtype: str, options: argparse.Namespace, folder: Path, num_tokens: int) -> Result:
    """Let one side train, and judge what came out."""
    model = folder / f"{side}-{dtype}-{seed}"
    task = {
        "teacher": str(options.model),
        "teacher_logits": side,
        "student": str(folder / "student"),
        "responses": str(folder / "train"),
        "rows": str(folder / "train" / "rows.jsonl"),
        "validation": str(folder / "held_out_prompts"),
        "model": str(model),
        "dtype": dtype,
        "seed": seed,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "max_length": MAX_LENGTH,
        "threads": options.threads,
        "trainer": trainer_arguments(options, seed, dtype),
    }
    path = folder / "task.json"
    path.write_text(json.dumps(task))
    command = {
        "trl": [str(options.peer), str(HERE / "trl_gkd.py"), str(path)],
        "plain": [sys.executable, "-m", "tests.benchmarks.plain_trainer", str(path)],
    }.get(side, [sys.executable, "-m", "tests.benchmarks.distillation", "--task", str(path)])
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    kl, cross_entropy = judge(model, options.model, folder / "held_out" / "rows.jsonl")
    result = Result(num_tokens / said["seconds"], said["peak_rss_bytes"], kl, cross_entropy)
    print(f"{dtype}, seed {seed}, {side}: {result}", file=sys.stderr, flush=True)
    return result


def judge(student: Path, teacher: Path, rows: Path) -> tuple[float, float]:
    """Forward KL and cross-entropy per answer token, in nats, in float32."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.benchmarks.plain_trainer import encode

    tokenizer: Any = AutoTokenizer.from_pretrained(teacher)
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, teacher)]
    kl = cross_entropy = count = 0.0
    with torch.inference_mode():
        for line in rows.read_text().splitlines():
            row = encode(tokenizer, json.loads(line)["messages"], 512)
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            ours, theirs = (F.log_softmax(model(ids).logits[0, :-1][labels != -100], -1) for model in models)
            kl += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
            cross_entropy += float(F.nll_loss(ours, labels[labels != -100], reduction="sum"))
            count += len(ours)
    return kl / count, cross_entropy / count


def count_tokens(responses: Path, student: Path) -> int:
    """Real tokens of all rows."""
    from slmops import torch_models
    from slmops.records import read_records
    from slmops.training.batches import encode_rows

    rows = encode_rows(torch_models.load_tokenizer(student), read_records(responses), MAX_LENGTH, last_turn_only=True)
    return sum(len(row.input_ids) for row in rows)


def table(results: dict[tuple[str, str], list[Result]]) -> str:
    """Markdown. Ratios are medians over turns, each with the peer's turn of the same seed."""
    lines = [
        "| in | | real tokens/s | times TRL | peak MB | of TRL's | held-out KL | held-out cross-entropy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (side, dtype), found in results.items():
        peers = results.get(("trl", dtype), found)
        ratios = [one.tokens_per_s / other.tokens_per_s for one, other in zip(found, peers, strict=True)]
        memory = statistics.median(one.peak_rss_bytes for one in found)
        lines.append(
            f"| {dtype} | {SIDES[side]} | {statistics.median(one.tokens_per_s for one in found):,.0f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {memory / 1e6:,.0f} "
            f"| {memory / statistics.median(one.peak_rss_bytes for one in peers):.2f} "
            f"| {_spread([one.kl for one in found])} | {_spread([one.cross_entropy for one in found])} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def _dtypes() -> list[str]:
    import torch

    from slmops.hardware import pick_dtype

    chosen = str(pick_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    return ["float32"] if chosen == "float32" else ["float32", chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="Python of an environment with trl; without it that side is left out")
    parser.add_argument("--model", type=Path, help="the teacher, a Hugging Face directory")
    parser.add_argument("--rows", type=Path, help="chat records, rows.jsonl")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", nargs="+", help="default: float32, and bfloat16 where the processor multiplies it")
    parser.add_argument("--sides", nargs="+", default=list(SIDES))
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        train_ours(json.loads(options.task.read_text()))
        return
    options.dtype = options.dtype or _dtypes()
    if options.model is None or options.rows is None:
        options.model, options.rows = teacher_of_the_demo()
    sides = [side for side in options.sides if side != "trl" or options.peer]
    results: dict[tuple[str, str], list[Result]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(options, folder)
        num_tokens = count_tokens(folder / "train", folder / "student")
        for seed in range(options.seeds):
            for dtype in options.dtype:
                for side in sides:
                    result = turn(side, seed, dtype, options, folder, num_tokens)
                    results.setdefault((side, dtype), []).append(result)
    print(table(results))


if __name__ == "__main__":
    main()
