"""The training loop that finetune and distill share."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from slmops import hardware
from slmops.errors import ModelError, Stopped, TransientError
from slmops.progress import Progress, log
from slmops.training import interruption, ranks
from slmops.training.batches import Batch, Row, batches_by_length, collate, plan_batches
from slmops.training.checkpoints import Checkpoints
from slmops.training.config import TrainingConfig
from slmops.training.curves import Curves
from slmops.training.head import SparseHead, loss_on_labels
from slmops.training.optimization import make_optimizer, make_schedule
from slmops.training.preparation import prepared
from slmops.training.sharding import Replicated, Sharded
from slmops.training.tracking import Trackers, following

MAX_HALVINGS = 3
"""How often the rows of a forward pass are halved before memory is given up on."""
FIRST_STEPS, LAST_STEPS = 5, 20
DIVERGED_FACTOR = 3.0
DIVERGED_RISE = 1.0
"""A loss that in its last 20 steps is thrice that of the first 5, and a nat above, will not come back."""

Loss = Callable[[SparseHead, Batch], torch.Tensor]
"""Sum of the loss over the N positions of a batch, with a graph to the parameters."""


@dataclass
class Task:
    """Everything a training run needs; `train` only runs it."""

    model: PreTrainedModel
    """What is trained; afterwards whole in the first process, where its weights were in shards meanwhile."""
    loss: Loss
    rows: Sequence[Row]
    validation_rows: Sequence[Row]
    config: TrainingConfig
    compute_dtype: torch.dtype
    pad_token_id: int
    work_dir: Path
    projections: torch.nn.Module = field(default_factory=torch.nn.Module)
    """What is trained beside the model and dropped at the end."""
    choose_rows: Callable[[int, float, Sequence[Row]], Sequence[Row]] | None = None
    """From a step's number, how far the run is (0 to 1) and the rows planned for it, those that it trains on."""
    metric: Callable[[], float] | None = None
    """Measured with each validation."""
    shared_prefix: bool = True
    """Whether all models of the loss may read once what the rows of a batch begin with."""


def train(task: Task, what: str) -> Curves:
    """Run all steps, going on from the last checkpoint if there is one.

    The same settings and rows give the same steps, whether or not the run was killed in between, and but for dropout
    whether one process runs them or several (see `ranks`). Only the first process validates, writes checkpoints and
    shows progress.

    Raises:
        ModelError: the loss is no longer finite or diverges, a token is unknown to the model, or memory is too small.
        ArtifactError: the checkpoint is damaged.
        DiskFullError: a checkpoint cannot be written.
        Stopped: the process was asked to end; what was done is kept.
        TransientError: of several processes, one is lost, or does not see the same work.
    """
    _check_tokens(task)
    run = _Run(task)
    first = run.restore()
    if not ranks.agree((task.work_dir.name, first, run.num_steps)):
        raise TransientError(
            f"the training's processes do not see the same work in {run.checkpoints.where} (this one is at step "
            f"{first}); is it on a volume that all of them share?"
        )
    leads = ranks.rank() == 0
    with (
        prepared(task.model, task.compute_dtype, task.config),
        interruption.noticed() as interrupted,
        following(what, task.config, task.work_dir, first) if leads else nullcontext(Trackers([])) as trackers,
        Progress(what, run.num_steps, "steps", done=first) as progress,
    ):
        run.train(trackers, progress, interrupted)
    run.save()
    run.use_best_weights()
    task.model = run.weights.whole_model()
    return run.curves


def where(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Facts about what a training ran on."""
    return {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "num_processes": ranks.size(),
    }


class _Run:
    """A training at work."""

    def __init__(self, task: Task) -> None:
        self.task, self.config, self.device = task, task.config, task.model.device
        self.num_steps = math.ceil(self.config.num_epochs * len(task.rows) / self.config.batch_size)
        self.plan = plan_batches(task.rows, self.config.batch_size, self.num_steps, self.config.seed)
        self.head = SparseHead(task.model)
        self.shared_prefix = task.shared_prefix and _may_share_prefix(self.config) and self.head.shares_prefix()
        in_shards = self.config.sharding == "full" and ranks.size() > 1
        self.weights = (Sharded if in_shards else Replicated)(task.model, task.projections)
        self.optimizer = make_optimizer(self.weights.trained.values(), self.config)
        self.schedule = make_schedule(self.optimizer, self.num_steps, self.config)
        self.curves = Curves()
        self.best: dict[str, torch.Tensor] = {}
        self.micro_batch_size = self.config.micro_batch_size
        self.num_halvings = 0
        self.checkpoints = Checkpoints(task.work_dir, self.config.checkpoint_uri)
        parts = self.config.num_validations - 1
        self.validate_at = {round(part * self.num_steps / parts) for part in range(parts + 1)}

    def train(self, trackers: Trackers, progress: Progress, interrupted: interruption.Interruption) -> None:
        """All steps that are left."""
        saved_at = time.monotonic()
        for step in range(len(self.curves.loss), self.num_steps):
            if self.validate(step, trackers):
                return
            started = time.monotonic()
            due = ranks.rank() == 0 and time.monotonic() - saved_at >= self.config.checkpoint_interval_s
            loss, stop, save = self.step(step, bool(interrupted), due)
            self.curves.seconds += time.monotonic() - started
            self.curves.num_tokens += sum(len(row.input_ids) for row in self.plan[step])
            self.curves.loss.append((step + 1, loss))
            self._check_converges()
            if ranks.rank() == 0:
                self._tell(trackers, progress)
            if stop or save:
                self.save()
                saved_at = time.monotonic()
            if stop:
                raise Stopped(
                    f"stopped after step {step + 1} of {self.num_steps} by "
                    f"{interrupted.signal.name if interrupted.signal else 'a signal to another process'}; the same "
                    f"command goes on from the checkpoint in {self.checkpoints.where}"
                )
        self.validate(self.num_steps, trackers)

    def step(self, step: int, stop: bool, save: bool) -> tuple[float, bool, bool]:
        """One optimizer step; the mean loss per token of its rows, and whether any process says `stop`, or `save`."""
        rows = ranks.share(self.plan[step])
        torch.manual_seed(ranks.seed(self.config.seed, step))
        if self.task.choose_rows is None:
            num_targets = float(sum(len(row.targets) for row in self.plan[step]))
        else:
            rows = self.task.choose_rows(step, step / self.num_steps, rows)
            (num_targets,) = ranks.sum_numbers([sum(len(row.targets) for row in rows)], self.device)
        loss, stops, saves = ranks.sum_numbers([self._accumulate(rows, num_targets, step), stop, save], self.device)
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss of step {step + 1} is {loss}; the rows of its batch are "
                f"{[row.index for row in self.plan[step]]}. Lower learning_rate, or look at these rows"
            )
        self.weights.sum_gradients()
        torch.nn.utils.clip_grad_norm_(self.weights.trained.values(), self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, stops > 0, saves > 0

    def _accumulate(self, rows: Sequence[Row], num_targets: float, step: int) -> float:
        """Gradients of this process's rows, in as many forward passes as memory wants; their part of the loss."""
        while True:
            try:
                return self._forward_and_backward(rows, num_targets, step)
            except RuntimeError as error:
                if not hardware.is_out_of_memory(error):
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                self._halve(step, error)
            hardware.release_memory(self.device)

    def _forward_and_backward(self, rows: Sequence[Row], num_targets: float, step: int) -> float:
        """Weighs micro-batches by their share of the step's tokens, so that their gradients add up.

        They do so over the micro-batches of one process as over the processes.
        """
        self.task.model.train()
        torch.manual_seed(ranks.seed(self.config.seed, step))
        total = 0.0
        parts = [rows[start : start + self.micro_batch_size] for start in range(0, len(rows), self.micro_batch_size)]
        for number in range(self.weights.num_passes(len(parts))):
            batch, share = (parts[number], 1.0) if number < len(parts) else (self.plan[step][:1], 0.0)
            loss = self.weights.forward(partial(self._loss, batch)) * (share / num_targets)
            (loss * self.weights.gradient_scale).backward()
            total += loss.item()
        return total

    def _loss(self, rows: Sequence[Row]) -> torch.Tensor:
        batch = collate(
            rows,
            self.task.pad_token_id,
            self.device,
            packed=self.config.packing,
            shared_prefix=self.shared_prefix,
        )
        with self._autocast():
            return self.task.loss(self.head, batch)

    def _halve(self, step: int, error: RuntimeError) -> None:
        """
        Raises:
            ModelError: it was halved often enough, or cannot be.
        """
        if self.num_halvings == MAX_HALVINGS or self.micro_batch_size == 1:
            raise ModelError(
                f"memory ran out in step {step + 1} with {self.micro_batch_size} rows in a forward pass, after halving "
                f"micro_batch_size {self.num_halvings} times; lower max_length, set activation_checkpointing=true, or "
                "take a device with more memory"
            ) from error
        self.num_halvings += 1
        self.micro_batch_size = max(1, self.micro_batch_size // 2)
        log.warning(
            "memory ran out in step %d; going on with %d rows in a forward pass, and more passes for each step",
            step + 1,
            self.micro_batch_size,
        )

    def validate(self, step: int, trackers: Trackers) -> bool:
        """Measure held-out rows if it is time to; whether training is to end, because they got no better for long."""
        if step not in self.validate_at:
            return False
        curves = self.curves
        if self.weights.validates and all(at != step for at, _ in curves.validation):
            curves.validation.append((step, self._validation_loss()))
            values = {"validation_loss": curves.validation[-1][1]}
            if self.task.metric:
                self.task.model.eval()
                with self._autocast():
                    curves.metric.append((step, self.task.metric()))
                values["metric"] = curves.metric[-1][1]
            trackers.log(step, values)
            if self.config.keep_weights == "best" and curves.best[0] == step:
                weights, _ = self.weights.state(self.optimizer)
                self.best = {name: value.detach().cpu().clone() for name, value in weights.items()}
        stale = ranks.rank() == 0 and curves.num_stale_validations >= self.config.patience
        (any_stale,) = ranks.sum_numbers([stale], self.device)
        if any_stale and step < self.num_steps:
            curves.stopped_early = True
            log.info(
                "held-out rows got no better in %d validations; stopping after step %d", self.config.patience, step
            )
        return curves.stopped_early

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Mean cross-entropy per token, in nats, on the first held-out rows."""
        self.task.model.eval()
        total, count = 0.0, 0
        rows = self.task.validation_rows[: self.config.max_validation_rows]
        for batch in batches_by_length(
            rows, self.micro_batch_size, self.task.pad_token_id, self.device, packed=self.config.packing
        ):
            total += self.weights.forward(partial(self._labels_loss, batch)).item()
            count += len(batch.target_ids)
        return total / count

    def _labels_loss(self, batch: Batch) -> torch.Tensor:
        with self._autocast():
            return loss_on_labels(self.head, batch)

    def use_best_weights(self) -> None:
        """Put the weights of the best validation back, where they are to be kept."""
        if self.best:
            log.info("keeping the weights after step %d, where held-out rows were best", self.curves.best[0])
            self.weights.load(self.best, None, {})

    def save(self) -> None:
        """Write a checkpoint; all processes do so together, and the first one writes."""
        weights, optimizer = self.weights.state(self.optimizer)
        if ranks.rank() > 0:
            return
        state = {
            "weights": weights,
            "best": self.best,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "curves": vars(self.curves),
            "micro_batch_size": self.micro_batch_size,
        }
        self.checkpoints.save(state, len(self.curves.loss))

    def restore(self) -> int:
        """Load the last checkpoint, if there is one; the number of steps that are done."""
        found = self.checkpoints.load(self.task.model.device)
        if found is None:
            return 0
        state, step = found
        self.weights.load(state["weights"], self.optimizer, state["optimizer"])
        self.best = state["best"]
        self.schedule.load_state_dict(state["schedule"])
        vars(self.curves).update(copy.deepcopy(state["curves"]))
        self.micro_batch_size = state["micro_batch_size"]
        log.info("going on after step %d, from the checkpoint in %s", step, self.checkpoints.where)
        return step

    def _tell(self, trackers: Trackers, progress: Progress) -> None:
        step, loss = self.curves.loss[-1]
        tokens_per_s = self.curves.num_tokens / max(self.curves.seconds, 1e-9)
        memory = hardware.peak_memory_bytes(self.device)
        progress.advance(note=f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, {memory / 1e9:.2f} GB at most")
        trackers.log(
            step,
            {
                "loss": loss,
                "learning_rate": float(self.schedule.get_last_lr()[0]),
                "tokens_per_s": tokens_per_s,
                "peak_memory_bytes": memory,
            },
        )

    def _check_converges(self) -> None:
        """
        Raises:
            ModelError: the loss has risen too far.
        """
        losses = self.curves.loss
        if len(losses) < FIRST_STEPS + LAST_STEPS:
            return
        first, last = (
            statistics.median(value for _, value in part) for part in (losses[:FIRST_STEPS], losses[-LAST_STEPS:])
        )
        if last > DIVERGED_FACTOR * first and last > first + DIVERGED_RISE:
            raise ModelError(
                f"the loss rose from {first:.3f} to {last:.3f} by step {len(losses)}: learning_rate "
                f"{self.config.learning_rate:g} diverges; lower it, or raise warmup_fraction"
            )

    def _autocast(self) -> torch.autocast:
        dtype = self.task.compute_dtype
        enabled = dtype != torch.float32
        return torch.autocast(self.device.type, dtype=dtype if enabled else None, enabled=enabled)


def _may_share_prefix(config: TrainingConfig) -> bool:
    """A layer whose activations are computed again keeps no cache, and one that is in shards is run once in a pass."""
    return not config.activation_checkpointing and config.sharding == "none"


def _check_tokens(task: Task) -> None:
    """
    Raises:
        ModelError: a row has a token that the model does not know.
    """
    embeddings: Any = task.model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    for row in (*task.rows, *task.validation_rows):
        if max(row.input_ids) >= size:
            raise ModelError(
                f"row {row.index} has token {max(row.input_ids)}, but the model knows {size} tokens only; its "
                "tokenizer and its weights do not belong together"
            )
