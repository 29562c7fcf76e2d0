"""A peer of `tests.benchmarks.distillation`: the subclass of transformers' Trainer that most teams write first.

    python -m tests.benchmarks.plain_trainer task.json

Forward KL between the logits of student and teacher where there is a label, with transformers' own grouping by length.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def encode(tokenizer: Any, messages: list[dict[str, str]], max_length: int) -> dict[str, list[int]]:
    """Tokens of a conversation, with labels on its last turn up to the end-of-turn token."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    ids = ids[: ids.index(tokenizer.eos_token_id, len(prompt)) + 1][:max_length]
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    return {"input_ids": ids, "labels": labels, "length": len(ids)}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    import torch
    import torch.nn.functional as F
    from datasets import Dataset  # type: ignore[import-untyped]
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    class Distiller(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")[:, 1:]
            where = labels != -100
            ours = model(**inputs).logits[:, :-1][where]
            with torch.no_grad():
                theirs = teacher(**inputs).logits[:, :-1][where]
            loss = F.kl_div(F.log_softmax(ours, -1), F.log_softmax(theirs, -1), reduction="sum", log_target=True)
            return loss / (num_items_in_batch or where.sum())

    torch.set_num_threads(task["threads"])
    tokenizer: Any = AutoTokenizer.from_pretrained(task["student"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    student: Any = AutoModelForCausalLM.from_pretrained(task["student"], dtype=torch.float32)
    teacher: Any = AutoModelForCausalLM.from_pretrained(task["teacher"], dtype=getattr(torch, task["dtype"])).eval()
    rows = [json.loads(line)["messages"] for line in Path(task["rows"]).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            **task["trainer"],
            train_sampling_strategy="group_by_length",
        )
        trainer = Distiller(
            model=student,
            args=arguments,
            train_dataset=Dataset.from_list([encode(tokenizer, row, task["max_length"]) for row in rows]),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest"),
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    student.save_pretrained(task["model"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
