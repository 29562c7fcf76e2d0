"""evaluate: what a model answers on held-out rows, and how well it predicts the reference answers."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.evaluate.config import EvaluateConfig
from slmops.evaluate.matches import Match, match_of, same_text
from slmops.inference.runtime import Runtime, open_runtime
from slmops.progress import Progress, log
from slmops.records import ChatRecord, read_jsonl, read_records, write_jsonl
from slmops.tasks.interface import Task
from slmops.tasks.registry import Tasks
from slmops.variants import find_model

STEP = "evaluate"
PREDICTIONS = "predictions.jsonl"

MAX_CLASSES = 80
MAX_CLASS_CHARS = 100
OTHER = "(other)"

Z_95 = 1.959963984540054
"""Quantile of the normal distribution for a two-sided 95 % interval."""


def run(config: EvaluateConfig, *, model: Path, test: Path, evaluation: Path) -> Sidecar:
    """Answer the prompts of `test` with `model`, compare, and keep every answer.

    Raises:
        ArtifactError: an input is missing or half-written.
        ConfigError: a row's task is unknown, or its settings are wrong.
        ModelError: the model cannot be loaded.
    """
    files = find_model(model, config.variant)
    parents = [files.sidecar, artifacts.expect(test, "chat_dataset")]
    with artifacts.writing(evaluation, kind="evaluation", step=STEP, config=config, parents=parents) as draft:
        records = read_records(test)[: config.max_rows]
        tasks = Tasks(config.task_settings)
        by_task = _by_task(records, tasks) if config.match == "task" else {}
        runtime = open_runtime(
            files.directory,
            quantized=files.quantized,
            dtype=config.dtype,
            num_threads=len(os.sched_getaffinity(0)),
            batch_size=config.batch_size,
        )
        log.info("%d rows with %s", len(records), runtime.name)
        answers = _answer(runtime, records, config)
        losses = _losses(runtime, records, config)
        predictions = compare(records, answers, match_of(config.match, tasks))
        write_jsonl(draft.path / PREDICTIONS, predictions)
        draft.facts |= (
            summarize(predictions)
            | task_metrics(by_task, answers, records)
            | {
                "variant": files.variant,
                "model_digest": files.digest,
                "size_bytes": files.size_bytes,
                "perplexity": perplexity(losses),
                "match": config.match,
                "runtime": runtime.name,
            }
        )
    log.info("accuracy %.3f on %d rows", draft.facts["accuracy"], len(records))
    return draft.sidecar


def _answer(runtime: Runtime, records: Sequence[ChatRecord], config: EvaluateConfig) -> list[str]:
    """Answers in the order of `records`, asked in the order of their length, so that batches hold little padding."""
    order = sorted(range(len(records)), key=lambda index: sum(len(turn["content"]) for turn in records[index].prompt))
    answers: dict[int, str] = {}
    with Progress(f"{STEP} answers", len(records)) as progress:
        for start in range(0, len(order), config.batch_size):
            indices = order[start : start + config.batch_size]
            found = runtime.answer([records[index].prompt for index in indices], config.max_new_tokens)
            answers |= dict(zip(indices, found, strict=True))
            progress.advance(len(indices))
    return [answers[index] for index in range(len(records))]


def _losses(runtime: Runtime, records: Sequence[ChatRecord], config: EvaluateConfig) -> list[tuple[float, int]]:
    losses: list[tuple[float, int]] = []
    with Progress(f"{STEP} perplexity", len(records)) as progress:
        for start in range(0, len(records), config.batch_size):
            losses += runtime.answer_losses(records[start : start + config.batch_size])
            progress.advance(min(config.batch_size, len(records) - start))
    return losses


def compare(records: Sequence[ChatRecord], answers: Sequence[str], matches: Match) -> list[dict[str, Any]]:
    """One prediction per record, in the form in which predictions are kept."""
    return [
        {
            "id": record.id,
            "prompt": record.prompt,
            "reference": record.completion,
            "prediction": answer,
            "correct": matches(answer, record),
            "exact": same_text(answer, record.completion),
            "stratum": record.stratum,
        }
        for record, answer in zip(records, answers, strict=True)
    ]


def summarize(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts and rates of predictions, all and by stratum."""
    num_rows = len(predictions)
    num_correct = sum(row["correct"] for row in predictions)
    low, high = wilson_interval(num_correct, num_rows)
    strata: dict[str, list[int]] = {}
    for row in predictions:
        counts = strata.setdefault(row["stratum"], [0, 0])
        counts[0] += row["correct"]
        counts[1] += 1
    return {
        "num_rows": num_rows,
        "num_correct": num_correct,
        "accuracy": num_correct / num_rows,
        "accuracy_low": low,
        "accuracy_high": high,
        "exact_match": sum(row["exact"] for row in predictions) / num_rows,
        "by_stratum": dict(sorted(strata.items())),
    }


def _by_task(records: Sequence[ChatRecord], tasks: Tasks) -> dict[str, tuple[Task, list[int]]]:
    """Each task of `records` by name, and where its records are, so that an unknown one is found at once."""
    indices: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        indices.setdefault(record.task, []).append(index)
    return {name: (tasks.named(name), found) for name, found in sorted(indices.items())}


def task_metrics(
    by_task: Mapping[str, tuple[Task, Sequence[int]]], answers: Sequence[str], records: Sequence[ChatRecord]
) -> dict[str, float]:
    """The figures that each task has of its own, as `<task>_<figure>`."""
    return {
        f"{name}_{figure}": value
        for name, (task, indices) in by_task.items()
        for figure, value in task.metrics([(answers[index], records[index].completion) for index in indices]).items()
    }


def write_confusion_matrix(evaluation: Path, path: Path) -> tuple[list[str], list[list[int]]]:
    """Count the predictions that `run` kept in `evaluation`; write the matrix to `path` as JSON, and return it."""
    classes, matrix = confusion_matrix([row for _, row in read_jsonl(evaluation / PREDICTIONS)])
    artifacts.write_json(path, {"classes": classes, "matrix": matrix})
    return classes, matrix


def confusion_matrix(predictions: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[int]]]:
    """Classes, and how many rows of each class (first index) were answered with which class (second index).

    Classes are the most frequent short reference answers and, last, OTHER: every other reference, and every answer that
    is none of them. A right answer counts for its reference's class, however it is written.
    """
    references = Counter(row["reference"].strip() for row in predictions)
    short = [name for name, _ in references.most_common() if len(name) <= MAX_CLASS_CHARS]
    classes = [*sorted(short[:MAX_CLASSES]), OTHER]
    index = {name: number for number, name in enumerate(classes)}
    matrix = [[0] * len(classes) for _ in classes]
    for row in predictions:
        reference = row["reference"].strip()
        answer = reference if row["correct"] else row["prediction"].strip()
        matrix[index.get(reference, -1)][index.get(answer, -1)] += 1
    return classes, matrix


def wilson_interval(num_correct: int, num_rows: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    share = num_correct / num_rows
    spread = Z_95**2 / num_rows
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / num_rows + spread / (4 * num_rows))
    return max(0.0, centre - half), min(1.0, centre + half)


def perplexity(losses: Sequence[tuple[float, int]]) -> float:
    """exp of the mean negative log-likelihood per token, from (sum in nats, tokens) per row."""
    return math.exp(min(sum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses), 700.0))
