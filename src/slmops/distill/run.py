"""distill: a small student learns from a teacher's responses, or from its distribution over tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slmops import artifacts, hardware, models, torch_models
from slmops.artifacts import Sidecar
from slmops.cached_logits import open_cached_logits, read_info
from slmops.distill import divergences
from slmops.distill.config import DistillConfig
from slmops.distill.matching import Matching
from slmops.distill.objective import CachedSource, Objective, OnlineSource, Source
from slmops.distill.on_policy import own_answers
from slmops.errors import ArtifactError, ConfigError, ModelError, TransientError
from slmops.progress import log
from slmops.records import ROWS, read_records
from slmops.resume import work_dir
from slmops.shaping.plan import StudentPlan, check_plan
from slmops.shaping.student import shape_student
from slmops.training import loop, ranks
from slmops.training.batches import Batch, Row, batches_by_length, encode_rows
from slmops.training.checkpoints import Checkpoints
from slmops.training.generating import make_metric
from slmops.training.head import SparseHead, loss_on_labels

STEP = "distill"
MAX_CALIBRATION_ROWS = 256
"""Rows on which the importance of a checkpoint's parts is measured."""


@dataclass(frozen=True)
class Inputs:
    """What a student is made from and learns from; all artifacts or model directories."""

    responses: Path
    """A teacher's answers, or, for objective=responses, chat records whose own answers are learned."""
    validation: Path
    teacher: Path
    student: Path
    """The checkpoint that the student is made of."""
    second_teacher: Path | None = None
    third_teacher: Path | None = None

    @property
    def teachers(self) -> list[Path]:
        return [path for path in (self.teacher, self.second_teacher, self.third_teacher) if path]


def run(config: DistillConfig, *, model: Path, **paths: Path) -> Sidecar:
    """Train a student on a teacher's responses, and write it to `model`; `paths` are those of `Inputs`.

    A killed run goes on from its last checkpoint when it is started again with the same settings and inputs.

    Raises:
        ArtifactError: an input is missing or half-written, or has no logits where they are asked for.
        ConfigError: settings and inputs do not fit, such as another temperature than the logits were kept at.
        ModelError: student and teacher have different tokenizers, or the student cannot be trained.
        DataError: no row is short enough.
    """
    hardware.use_huge_pages()
    inputs = Inputs(**paths)
    parents = _open(config, inputs)
    unfinished = work_dir(STEP, config, parents, model)
    with artifacts.writing(model, kind="hf_model", step=STEP, config=config, parents=parents) as draft:
        trained = _train(config, inputs, unfinished)
        stored_dtype = torch_models.stored_dtype(inputs.student)
        torch_models.save_model(torch_models.cast(trained.model, stored_dtype), trained.tokenizer, draft.path)
        draft.facts |= trained.facts | {"tokenizer_digest": models.tokenizer_digest(draft.path)}
    Checkpoints(unfinished, config.checkpoint_uri).remove()
    return draft.sidecar


def take_part(config: DistillConfig, *, model: Path, **paths: Path) -> None:
    """What the processes of a training but the first do: compute their share of `run`, and write nothing."""
    hardware.use_huge_pages()
    inputs = Inputs(**paths)
    _train(config, inputs, work_dir(STEP, config, _open(config, inputs), model))


@dataclass
class _Trained:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, object]


def _open(config: DistillConfig, inputs: Inputs) -> list[Sidecar]:
    """Check all that can be checked before a model is loaded."""
    divergences.find(config.divergence, config.divergence_settings)
    check_plan(_plan(config), models.read_config(inputs.student))
    kinds: tuple[artifacts.Kind, ...] = (
        ("responses",) if config.objective == "logits" else ("responses", "chat_dataset")
    )
    rows = [artifacts.expect(inputs.responses, *kinds), artifacts.expect(inputs.validation, "chat_dataset")]
    teachers = [models.open_model(teacher) for teacher in inputs.teachers]
    if config.objective == "logits":
        check_teachers(config, inputs, teachers)
        check_tokenizers(config, inputs)
    return [*rows, *teachers, models.open_model(inputs.student)]


def check_teachers(config: DistillConfig, inputs: Inputs, teachers: Sequence[Sidecar]) -> None:
    """
    Raises:
        ArtifactError: the kept logits are those of other answers or of another teacher, or are not there.
        ConfigError: weights do not fit the teachers, or the logits were kept at another temperature.
    """
    if config.teacher_weights and len(config.teacher_weights) != len(inputs.teachers):
        raise ConfigError(
            f"teacher_weights has {len(config.teacher_weights)} numbers for {len(inputs.teachers)} teachers; give one "
            "for each"
        )
    if config.teacher_logits == "online":
        return
    if len(inputs.teachers) > 1:
        raise ConfigError("kept logits are of one teacher; set teacher_logits=online for several")
    kept = read_info(inputs.responses)
    if kept.temperature != config.temperature:
        raise ConfigError(
            f"temperature is {config.temperature}, but the logits were kept at {kept.temperature}; set both alike "
            "(generate_responses.logits_temperature), or use teacher_logits=online"
        )
    if kept.teacher_digest != (found := teachers[0].digest):
        raise ArtifactError(
            f"the logits in {inputs.responses} were kept of teacher {kept.teacher_digest[:12]}, and {inputs.teacher} "
            f"is {found[:12]}; give the teacher that answered, or run generate_responses again"
        )
    artifacts.verify(inputs.responses, ROWS)


def check_tokenizers(config: DistillConfig, inputs: Inputs) -> None:
    """Find out before any model is loaded whether a teacher's distribution means anything to the student.

    Raises:
        ModelError: student and teacher have different tokenizers or chat templates.
    """
    ours = models.tokenizer_digest(inputs.student), models.template_digest(inputs.student)
    if config.teacher_logits == "cached":
        kept = read_info(inputs.responses)
        theirs = [(kept.tokenizer_digest, kept.template_digest)]
    else:
        theirs = [(models.tokenizer_digest(path), models.template_digest(path)) for path in inputs.teachers]
    remedies = {
        "tokenizer": "use objective=responses",
        "chat template": "give the student the teacher's chat_template.jinja",
    }
    for each in theirs:
        for (what, remedy), our, their in zip(remedies.items(), ours, each, strict=True):
            if our != their:
                raise ModelError(
                    f"student and teacher have different {what}s ({our[:12]} and {their[:12]}), so their logits are "
                    f"not about the same tokens; {remedy}"
                )


def _plan(config: DistillConfig) -> StudentPlan:
    return StudentPlan(
        weights=config.student_weights,
        shape=config.student_shape,
        layer_rule=config.layer_rule,
        keep_layers=config.keep_layers,
    )


def _train(config: DistillConfig, inputs: Inputs, unfinished: Path) -> _Trained:
    hardware.use_all_cores()
    torch.manual_seed(config.seed)
    device = hardware.pick_device()
    dtype = hardware.pick_dtype(config.dtype, device)
    tokenizer = torch_models.load_tokenizer(inputs.student)
    records, held_out = read_records(inputs.responses), read_records(inputs.validation)
    # Of a teacher's responses only the last turn is the teacher's.
    last_turn_only = artifacts.read(inputs.responses).kind == "responses"
    rows = encode_rows(tokenizer, records, config.max_length, last_turn_only=last_turn_only)
    learner, shape = _make_student(config, inputs, rows, tokenizer, device)
    objective = _make_objective(config, inputs, len(records), learner, dtype, device)
    log.info(
        "%s parameters learn from the %s of %d rows on %s",
        f"{torch_models.num_parameters(learner):,}",
        config.objective,
        len(rows),
        hardware.describe(device, dtype),
    )
    task = loop.Task(
        model=learner,
        loss=objective or loss_on_labels,
        rows=rows,
        validation_rows=encode_rows(tokenizer, held_out, config.max_length, last_turn_only=True),
        config=config,
        compute_dtype=dtype,
        pad_token_id=tokenizer.pad_token_id,
        work_dir=unfinished,
        choose_rows=own_answers(learner, tokenizer, config),
        metric=make_metric(learner, tokenizer, held_out, config),
        shared_prefix=objective is None or objective.shares_prefix(),
    )
    if objective and objective.matching:
        task.projections = objective.matching
    curves = loop.train(task, STEP)
    facts = curves.facts() | loop.where(device, dtype) | shape
    facts |= {"objective": config.objective, "num_parameters": torch_models.num_parameters(task.model)}
    return _Trained(task.model, tokenizer, facts)


def _make_student(
    config: DistillConfig, inputs: Inputs, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[PreTrainedModel, dict[str, object]]:
    """The student before training, and facts about what it was made of."""
    checkpoint = torch_models.load_model(inputs.student, dtype=torch.float32, device=device)

    def calibration() -> Iterable[Batch]:
        return batches_by_length(rows[:MAX_CALIBRATION_ROWS], config.micro_batch_size, tokenizer.pad_token_id, device)

    student, facts = shape_student(checkpoint, _plan(config), calibration, config.seed)
    if not ranks.agree(facts):
        raise TransientError("the training's processes measured importance differently; name the layers in keep_layers")
    size, largest = torch_models.num_parameters(student), max(map(models.num_weights, inputs.teachers))
    if size > largest:
        log.warning(
            "the student has %s parameters, more than its teacher with %s: it can learn no more than the teacher knows",
            f"{size:,}",
            f"{largest:,}",
        )
    return student, facts


def _make_objective(
    config: DistillConfig,
    inputs: Inputs,
    num_rows: int,
    student: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
) -> Objective | None:
    """The loss of objective=logits; None for objective=responses."""
    if config.objective == "responses":
        return None
    divergence = divergences.find(config.divergence, config.divergence_settings)
    matching, sources = None, list[Source]()
    if config.teacher_logits == "cached":
        sources.append(CachedSource(open_cached_logits(inputs.responses, num_rows), divergence, config.temperature))
    else:
        teachers = [torch_models.load_model(path, dtype=dtype, device=device) for path in inputs.teachers]
        sources += [OnlineSource(SparseHead(teacher), divergence, config.temperature) for teacher in teachers]
        if config.hidden_weight or config.attention_weight:
            matching = Matching(
                student,
                teachers[0],
                chosen_layers=config.layer_map,
                hidden_weight=config.hidden_weight,
                attention_weight=config.attention_weight,
            )
    weights = config.teacher_weights or [1.0] * len(sources)
    return Objective(
        sources=sources,
        weights=[weight / sum(weights) for weight in weights],
        temperature=config.temperature,
        hard_label_weight=config.hard_label_weight,
        matching=matching,
    )
