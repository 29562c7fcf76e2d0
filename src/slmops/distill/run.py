"""distill: a small student learns from a teacher's responses, or from its distribution over tokens."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slmops import artifacts, hardware, models, torch_models
from slmops.artifacts import Sidecar
from slmops.cached_logits import open_cached_logits
from slmops.distill.config import DistillConfig
from slmops.distill.students import keep_layers
from slmops.errors import ConfigError, ModelError
from slmops.progress import log
from slmops.records import read_records
from slmops.resume import work_dir
from slmops.training import loop
from slmops.training.batches import Batch, encode_rows
from slmops.training.head import SparseHead
from slmops.training.losses import cross_entropy, forward_kl, forward_kl_top_k

STEP = "distill"


def run(
    config: DistillConfig, *, responses: Path, validation: Path, teacher: Path, student: Path, model: Path
) -> Sidecar:
    """Train `student`, or some of its layers, on a teacher's `responses`, and write it to `model`.

    A killed run goes on from its last checkpoint when it is started again with the same settings and inputs.

    Raises:
        ArtifactError: an input is missing or half-written, or has no logits where they are asked for.
        ConfigError: settings and inputs do not fit, such as another temperature than the logits were kept at.
        ModelError: student and teacher have different tokenizers, or the student cannot be trained.
        DataError: no row is short enough.
    """
    parents = _open(config, responses, validation, teacher, student)
    unfinished = work_dir(STEP, config, parents, model)
    with artifacts.writing(model, kind="hf_model", step=STEP, config=config, parents=parents) as draft:
        trained = _train(config, responses, validation, teacher, student, unfinished)
        stored_dtype = torch_models.stored_dtype(student)
        torch_models.save_model(torch_models.cast(trained.model, stored_dtype), trained.tokenizer, draft.path)
        draft.facts |= trained.curves.facts() | trained.ran_on
        draft.facts |= {
            "objective": config.objective,
            "num_parameters": torch_models.num_parameters(trained.model),
            "tokenizer_digest": models.tokenizer_digest(draft.path),
        }
    shutil.rmtree(unfinished)
    return draft.sidecar


def take_part(
    config: DistillConfig, *, responses: Path, validation: Path, teacher: Path, student: Path, model: Path
) -> None:
    """What the processes of a training but the first do: compute their share of `run`, and write nothing."""
    parents = _open(config, responses, validation, teacher, student)
    _train(config, responses, validation, teacher, student, work_dir(STEP, config, parents, model))


@dataclass
class _Trained:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    curves: loop.Curves
    ran_on: dict[str, object]


def _open(config: DistillConfig, responses: Path, validation: Path, teacher: Path, student: Path) -> list[Sidecar]:
    parents = [
        artifacts.expect(responses, "responses"),
        artifacts.expect(validation, "chat_dataset"),
        models.open_model(teacher),
        models.open_model(student),
    ]
    if config.objective == "logits":
        check_logits_fit(config, parents[0], teacher, student)
    return parents


def _train(
    config: DistillConfig, responses: Path, validation: Path, teacher: Path, student: Path, unfinished: Path
) -> _Trained:
    hardware.use_huge_pages()
    hardware.use_all_cores()
    torch.manual_seed(config.seed)
    device = hardware.pick_device()
    dtype = hardware.pick_dtype(config.dtype, device)
    tokenizer = torch_models.load_tokenizer(student)
    records = read_records(responses)
    rows = encode_rows(tokenizer, records, config.max_length, last_turn_only=True)
    validation_rows = encode_rows(tokenizer, read_records(validation), config.max_length, last_turn_only=True)
    learner = torch_models.load_model(student, dtype=torch.float32, device=device)
    keep_layers(learner, config.keep_layers)
    log.info(
        "%s parameters learn from the %s of %d rows on %s",
        f"{torch_models.num_parameters(learner):,}",
        config.objective,
        len(rows),
        hardware.describe(device, dtype),
    )
    task = loop.Task(
        model=learner,
        loss=_make_loss(config, responses, len(records), teacher, student, dtype, device),
        rows=rows,
        validation_rows=validation_rows,
        config=config,
        compute_dtype=dtype,
        pad_token_id=tokenizer.pad_token_id,
        work_dir=unfinished,
    )
    curves = loop.train(task, STEP)
    return _Trained(learner, tokenizer, curves, loop.where(device, dtype))


def check_logits_fit(config: DistillConfig, responses: Sidecar, teacher: Path, student: Path) -> None:
    """Find out before any model is loaded whether the teacher's distribution means anything to the student.

    Raises:
        ModelError: they have different tokenizers.
        ConfigError: the kept logits were taken at another temperature.
    """
    ours = models.tokenizer_digest(student)
    theirs = models.tokenizer_digest(teacher)
    if config.teacher_logits == "cached":
        theirs = str(responses.facts.get("tokenizer_digest"))
        kept_at = responses.facts.get("logits_temperature")
        if kept_at is not None and kept_at != config.temperature:
            raise ConfigError(
                f"temperature is {config.temperature}, but the logits were kept at {kept_at}; set both alike "
                "(generate_responses.logits_temperature), or use teacher_logits=online"
            )
    if ours != theirs:
        raise ModelError(
            f"student and teacher have different tokenizers ({ours[:12]} and {theirs[:12]}), so their logits are not "
            "about the same tokens; use objective=responses"
        )


def _make_loss(
    config: DistillConfig,
    responses: Path,
    num_rows: int,
    teacher: Path,
    student: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> loop.Loss:
    """The objective, as a function of the student's logits and the batch."""
    if config.objective == "responses":
        return lambda logits, batch: cross_entropy(logits, batch.target_ids)
    if config.teacher_logits == "cached":
        distance = _cached_distance(responses, num_rows, config.temperature, student, device)
    else:
        model = torch_models.load_model(teacher, dtype=dtype, device=device)
        distance = _online_distance(model, config.temperature)
    weight = config.hard_label_weight
    if weight == 0.0:
        return distance
    return lambda logits, batch: (
        (1 - weight) * distance(logits, batch) + weight * cross_entropy(logits, batch.target_ids)
    )


def _online_distance(teacher: PreTrainedModel, temperature: float) -> loop.Loss:
    """Forward KL to a teacher that runs beside the student."""
    head = SparseHead(teacher)

    def distance(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = head.logits(batch)
        return forward_kl(logits, teacher_logits, temperature)

    return distance


def _cached_distance(
    responses: Path, num_rows: int, temperature: float, student: Path, device: torch.device
) -> loop.Loss:
    """Forward KL to the k likeliest tokens that the teacher's answers were kept with."""
    cached = open_cached_logits(
        responses,
        num_rows,
        tokenizer_digest=models.tokenizer_digest(student),
        template_digest=models.template_digest(student),
    )

    def distance(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        positions = np.concatenate(
            [np.arange(cached.row_starts[row.index], cached.row_starts[row.index + 1]) for row in batch.rows]
        )
        if len(positions) != len(logits):
            raise ModelError("the kept logits do not fit the answers' tokens; run generate_responses again")
        return forward_kl_top_k(
            logits,
            torch.from_numpy(cached.top_ids[positions].astype(np.int64)).to(device),
            torch.from_numpy(cached.top_log_probs[positions].astype(np.float32)).to(device),
            torch.from_numpy(cached.tail_log_prob[positions]).to(device),
            temperature,
        )

    return distance
