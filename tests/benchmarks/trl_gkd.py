"""The peer of `tests.benchmarks.distillation`: TRL's GKDTrainer, offline, in an environment of its own.

    python trl_gkd.py task.json

Forward KL (beta 0) on given answers (lmbda 0), as a user of TRL would set it up for a teacher that fits beside the
student, without gradient checkpointing, which TRL turns on by default and which would only slow it here.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # type: ignore[import-not-found]

    torch.set_num_threads(task["threads"])
    tokenizer: Any = AutoTokenizer.from_pretrained(task["student"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    student: Any = AutoModelForCausalLM.from_pretrained(task["student"], dtype=torch.float32)
    teacher: Any = AutoModelForCausalLM.from_pretrained(task["teacher"], dtype=getattr(torch, task["dtype"]))
    rows = [json.loads(line)["messages"] for line in Path(task["rows"]).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as directory:
        config = GKDConfig(
            output_dir=directory,
            **task["trainer"],
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            max_length=task["max_length"],
            gradient_checkpointing=False,
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_list([{"messages": row} for row in rows]),
            processing_class=tokenizer,
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    student.save_pretrained(task["model"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
