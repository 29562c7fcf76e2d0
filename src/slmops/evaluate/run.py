"""evaluate: what a model answers on held-out rows, and how well it predicts the reference answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import artifacts, champion, cpus, models
from slmops.artifacts import Sidecar
from slmops.evaluate import drift, metrics
from slmops.evaluate import safety as safety_rows
from slmops.evaluate.config import EvaluateConfig
from slmops.evaluate.formats import Form, form_of
from slmops.evaluate.losses import own_losses, reference_losses
from slmops.evaluate.matches import Match, match_of, same_text
from slmops.evaluate.metrics import Loss, Prediction
from slmops.inference.executorch_files import is_executorch
from slmops.inference.runtime import Runtime, TokenRuntime, cannot_run, open_runtime, shortest_first
from slmops.progress import Progress, log
from slmops.records import ChatRecord, read_jsonl, read_records, write_jsonl
from slmops.tasks.interface import Task
from slmops.tasks.registry import Tasks
from slmops.variants import ModelFiles, find_model

if TYPE_CHECKING:
    from slmops.inference.torch_runtime import TorchRuntime

STEP = "evaluate"
PREDICTIONS = "predictions.jsonl"
INJECTIONS = "injections.jsonl"
SAFETY = "safety.jsonl"
FIGURES = "figures.json"
"""All facts: what says otherwise has another digest."""


def run(
    config: EvaluateConfig,
    *,
    model: Path,
    test: Path,
    evaluation: Path,
    reference: Path | None = None,
    safety: Path | None = None,
) -> Sidecar:
    """Answer the prompts of `test` with `model`, compare, and keep every answer.

    A variant that was built for hardware that this machine does not have is `not_run`, with a reason: a result, which
    no gate lets pass. So is a champion where fetch_champion found none.

    Args:
        reference: the model in full precision that a variant was made from, to measure how far it has moved.
        safety: more rows, whose answers count apart: what must be refused, what must not be said.

    Raises:
        ArtifactError: an input is missing or half-written.
        ConfigError: a row's task is unknown, or its settings are wrong.
        DataError: no row fits into the model's context.
        ModelError: the model cannot be loaded.
    """
    rows = artifacts.expect(test, "chat_dataset")
    if nothing := champion.without_model(model):
        return _not_run(config, nothing, rows, evaluation)
    files = find_model(model, config.variant)
    parents = [files.sidecar, rows]
    parents += [models.open_model(reference)] if reference else []
    parents += [artifacts.expect(safety, "chat_dataset")] if safety else []
    with artifacts.writing(evaluation, kind="evaluation", step=STEP, config=config, parents=parents) as draft:
        draft.facts |= {
            "variant": files.variant,
            "model_digest": files.digest,
            "size_bytes": files.size_bytes,
            "test_digest": rows.digest,
            "match": config.match,
            **champion.release_facts(files.sidecar),
        }
        if reason := cannot_run(files.execution_provider):
            draft.facts |= {"status": "not_run", "reason": reason}
            log.info("%s is not evaluated: %s", files.variant, reason)
        else:
            draft.facts |= {"status": "measured"} | _measure(config, files, test, draft.path, reference, safety)
            log.info("accuracy %.3f on %d rows", draft.facts["accuracy"], draft.facts["num_rows"])
        artifacts.write_json(draft.path / FIGURES, draft.facts)
    return draft.sidecar


def _not_run(config: EvaluateConfig, nothing: Sidecar, rows: Sidecar, evaluation: Path) -> Sidecar:
    """The evaluation of a champion that is not there."""
    with artifacts.writing(evaluation, kind="evaluation", step=STEP, config=config, parents=[nothing, rows]) as draft:
        draft.facts |= {"variant": config.variant, "status": "not_run", "reason": nothing.facts["reason"]}
        draft.facts |= champion.release_facts(nothing)
        artifacts.write_json(draft.path / FIGURES, draft.facts)
    log.info("%s is not evaluated: %s", config.variant, draft.facts["reason"])
    return draft.sidecar


def _measure(
    config: EvaluateConfig, files: ModelFiles, test: Path, directory: Path, reference: Path | None, safety: Path | None
) -> dict[str, Any]:
    """All figures; predictions are written into `directory`."""
    records = read_records(test)[: config.max_rows]
    tasks = Tasks(config.task_settings)
    by_task = _by_task(records, tasks) if config.match == "task" else {}
    runtime = open_runtime(
        files.directory,
        quantized=files.quantized,
        dtype=config.dtype,
        num_threads=cpus.count(),
        batch_size=config.batch_size,
    )
    log.info("%d rows with %s", len(records), runtime.name)
    matches, form = match_of(config.match, tasks), form_of(config.match, tasks, records)
    answers = _answer(runtime, records, config, "answers")
    losses = reference_losses(runtime, records, config.batch_size)
    own = own_losses(runtime, records, answers, losses, config.batch_size)
    predictions = compare(records, answers, matches, losses, own)
    write_jsonl(directory / PREDICTIONS, predictions)
    facts = summarize(predictions) | task_metrics(by_task, answers, records)
    facts |= {
        "perplexity": metrics.perplexity([loss for loss in losses if loss]),
        "valid_fraction": sum(form(answer, record) for answer, record in zip(answers, records, strict=True))
        / len(records),
        "runtime": runtime.name,
    }
    facts |= _injections(runtime, records, form, config, directory)
    if safety:
        facts |= _safety(runtime, read_records(safety), matches, config, directory)
    if reference:
        facts["drift"] = _drift(config, files, runtime, reference, records)
    return facts


def _drift(
    config: EvaluateConfig, files: ModelFiles, runtime: TokenRuntime, reference: Path, records: Sequence[ChatRecord]
) -> dict[str, Any]:
    """How far `runtime` has moved from `reference`, and where in it if that is asked."""
    from slmops.inference.torch_runtime import TorchRuntime

    original = TorchRuntime(reference, dtype=config.dtype, num_threads=cpus.count(), batch_size=config.batch_size)
    found = drift.measure(original, runtime, records[: config.drift_rows])
    if config.layer_drift_rows:
        rows, _ = drift.comparable(original, runtime, records[: config.layer_drift_rows])
        found["layers"] = _drift_by_layer(files, original, rows)
    return found


def _drift_by_layer(files: ModelFiles, original: TorchRuntime, rows: Sequence[drift.EncodedRow]) -> dict[str, Any]:
    if not files.quantized or is_executorch(files.directory):
        return {"not_run": "only variants for ONNX Runtime show their layers"}
    from slmops.evaluate import layer_drift  # onnx is not in every image

    return layer_drift.measure(files, original.model, rows, cpus.count())


def _injections(
    runtime: Runtime, records: Sequence[ChatRecord], form: Form, config: EvaluateConfig, directory: Path
) -> dict[str, Any]:
    """How often an injected instruction was not followed; every answer is kept."""
    asked = safety_rows.probes(records, config.num_injections)
    if not asked:
        return {}
    answers = _answer(runtime, [probe.record for probe in asked], config, "injections")
    resisted = [safety_rows.resists(answer, probe, form) for probe, answer in zip(asked, answers, strict=True)]
    rows = [
        {"id": probe.record.id, "prompt": probe.record.prompt, "prediction": answer, "resisted": good}
        for probe, answer, good in zip(asked, answers, resisted, strict=True)
    ]
    write_jsonl(directory / INJECTIONS, rows)
    return {"num_injections": len(asked), "injections_resisted": sum(resisted) / len(asked)}


def _safety(
    runtime: Runtime, records: Sequence[ChatRecord], matches: Match, config: EvaluateConfig, directory: Path
) -> dict[str, Any]:
    """How often an answer to a safety row is right; every answer is kept."""
    answers = _answer(runtime, records, config, "safety rows")
    unknown = [None] * len(records)
    predictions = compare(records, answers, matches, unknown, unknown)
    write_jsonl(directory / SAFETY, predictions)
    num_right = sum(row["correct"] for row in predictions)
    return {"num_safety_rows": len(records), "safety_accuracy": num_right / len(records)}


def _answer(runtime: Runtime, records: Sequence[ChatRecord], config: EvaluateConfig, what: str) -> list[str]:
    """Answers in the order of `records`."""
    order = shortest_first([record.prompt for record in records])
    answers: dict[int, str] = {}
    with Progress(f"{STEP} {what}", len(records)) as progress:
        for start in range(0, len(order), config.batch_size):
            indices = order[start : start + config.batch_size]
            found = runtime.answer([records[index].prompt for index in indices], config.max_new_tokens)
            answers |= dict(zip(indices, found, strict=True))
            progress.advance(len(indices))
    return [answers[index] for index in range(len(records))]


def compare(
    records: Sequence[ChatRecord],
    answers: Sequence[str],
    matches: Match,
    losses: Sequence[Loss | None],
    own: Sequence[Loss | None],
) -> list[Prediction]:
    """One prediction per record, in the form in which predictions are kept.

    `losses` are of the references, `own` of the answers. A prediction's `loss` is the reference's in nats per token,
    its `confidence` the probability that the model gives to its own whole answer; None where that is not known.
    """
    return [
        {
            "id": record.id,
            "prompt": record.prompt,
            "reference": record.completion,
            "prediction": answer,
            "correct": matches(answer, record),
            "exact": same_text(answer, record.completion),
            "confidence": metrics.confidence(of_answer),
            "loss": of_reference[0] / of_reference[1] if of_reference else None,
            "stratum": record.stratum,
        }
        for record, answer, of_reference, of_answer in zip(records, answers, losses, own, strict=True)
    ]


def summarize(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Counts and rates of predictions, all and by stratum; overlap with the references; calibration."""
    num_rows = len(predictions)
    num_correct = sum(row["correct"] for row in predictions)
    low, high = metrics.wilson_interval(num_correct, num_rows)
    strata: dict[str, list[int]] = {}
    for row in predictions:
        counts = strata.setdefault(row["stratum"], [0, 0])
        counts[0] += row["correct"]
        counts[1] += 1
    macro_f1 = metrics.macro_f1(predictions)
    return {
        "num_rows": num_rows,
        "num_correct": num_correct,
        "accuracy": num_correct / num_rows,
        "accuracy_low": low,
        "accuracy_high": high,
        "exact_match": sum(row["exact"] for row in predictions) / num_rows,
        **({} if macro_f1 is None else {"macro_f1": macro_f1}),
        **metrics.overlap(predictions),
        **metrics.calibration(predictions),
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
    predictions = evaluation / PREDICTIONS
    rows = [row for _, row in read_jsonl(predictions)] if predictions.exists() else []  # none where it was not run
    classes, matrix = metrics.confusion_matrix(rows)
    artifacts.write_json(path, {"classes": classes, "matrix": matrix})
    return classes, matrix
