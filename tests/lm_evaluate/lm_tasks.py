"""Small tasks for lm_evaluate, and what their figures are by a model alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from slmops.artifacts import Sidecar
from slmops.config import TEACHER_API_KEY, TEACHER_API_KEY_FILE
from slmops.lm_evaluate.config import LmEvaluateConfig
from slmops.lm_evaluate.results import SAMPLES
from slmops.lm_evaluate.run import run
from slmops.records import read_jsonl, read_records, write_jsonl
from tests.datasets import ACTIONS, DEVICES

NUM_ROWS = 12
CHOICES = [f"{action} {device}" for action in ACTIONS for device in DEVICES]
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEXT = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"}
TASKS: dict[str, dict[str, Any]] = {
    "choose": TEXT
    | {
        "output_type": "multiple_choice",
        "doc_to_text": TURN.format("{{request}}").rstrip(),
        "doc_to_choice": CHOICES,
        "doc_to_target": "{{command}}",
        "target_delimiter": "\n",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "answer": TEXT
    | {
        "output_type": "generate_until",
        "doc_to_text": TURN.format("{{request}}"),
        "doc_to_target": "{{command}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["<|im_end|>"], "do_sample": False, "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "read": TEXT
    | {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{request}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    # Asked as a conversation: the template comes from the target.
    "talk": TEXT
    | {
        "output_type": "generate_until",
        "doc_to_text": "{{request}}",
        "doc_to_target": "{{command}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 16},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def go_offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No hub, no key, and a cache of its own, as in a container."""
    import datasets  # type: ignore[import-untyped]
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.delenv(TEACHER_API_KEY, raising=False)
    monkeypatch.delenv(TEACHER_API_KEY_FILE, raising=False)


def write_tasks(folder: Path, dataset: Path) -> Path:
    """A folder with the tasks above, and their data."""
    folder.mkdir()
    write_jsonl(folder / "rows.jsonl", rows_of(dataset))
    for name, settings in TASKS.items():
        write_task(folder, name, settings)
    return folder


def rows_of(dataset: Path) -> list[dict[str, str]]:
    return [{"request": r.messages[0].content, "command": r.completion} for r in read_records(dataset)][:NUM_ROWS]


def write_task(folder: Path, name: str, settings: dict[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **settings}, sort_keys=False))


def lm_evaluate(tmp_path: Path, model: Path | None, task_files: Path | None, *tasks: str, **settings: Any) -> Sidecar:
    config = LmEvaluateConfig.create({"tasks": list(tasks)} | settings)
    return run(config, model=model, task_files=task_files, lm_evaluation=tmp_path / "lm_evaluation")


def answers(tmp_path: Path, task: str) -> list[str]:
    return [str(row["resps"][0][0]) for row in samples(tmp_path, task)]


def samples(tmp_path: Path, task: str) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(tmp_path / "lm_evaluation" / SAMPLES / f"{task}.jsonl")]


class Plain:
    """The same model by transformers alone, one sequence at a time."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def scores(self, prompt: str) -> list[float]:
        """The log-likelihood of each choice, with the newline before it."""
        context = self.encode(prompt.rstrip())
        return [self.log_likelihood(context, self.encode(prompt + choice)[len(context) :]) for choice in CHOICES]

    @torch.inference_mode()
    def log_likelihood(self, context: list[int], continuation: list[int]) -> float:
        ids = torch.tensor([context + continuation])
        log_probs = self.model(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
        return float(log_probs[range(len(continuation)), continuation].sum())

    @torch.inference_mode()
    def answer(self, prompt: str) -> str:
        ids = torch.tensor([self.encode(prompt)])
        mask = torch.ones_like(ids)
        found = self.model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        return str(self.tokenizer.decode(found, skip_special_tokens=True))


class PlainGenAI(Plain):
    """A variant by onnxruntime-genai alone."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = og.Model(str(directory))

    def log_likelihood(self, context: list[int], continuation: list[int]) -> float:
        ids = context + continuation
        logits = self._fed(ids, len(ids)).get_output("logits")[0].astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return float(sum(log_probs[len(context) - 1 + at, token] for at, token in enumerate(continuation)))

    def answer(self, prompt: str) -> str:
        ids = self.encode(prompt)
        generator, found = self._fed(ids, len(ids) + 16), []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return str(self.tokenizer.decode(found, skip_special_tokens=True))

    def _fed(self, ids: list[int], max_length: int) -> Any:
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=max_length, do_sample=False)
        generator = og.Generator(self.model, parameters)
        generator.append_tokens(ids)
        return generator


def expected(plain: Plain, rows: list[dict[str, str]]) -> dict[str, float]:
    """The figures of the tasks above, from the model itself."""
    chosen, answered, read = 0, 0, 0.0
    for row in rows:
        prompt = TURN.format(row["request"])
        chosen += CHOICES[int(np.argmax(plain.scores(prompt)))] == row["command"]
        answered += plain.answer(prompt) == row["command"]
        read += plain.log_likelihood([plain.tokenizer.bos_token_id], plain.encode(row["request"]))
    num_words = sum(len(row["request"].split()) for row in rows)
    num_bytes = sum(len(row["request"].encode()) for row in rows)
    return {
        "choose_acc": chosen / len(rows),
        "answer_exact_match": answered / len(rows),
        "read_word_perplexity": math.exp(-read / num_words),
        "read_byte_perplexity": math.exp(-read / num_bytes),
    }
