"""The training loop that finetune and distill share: optimizer, schedule, checkpoints, curves."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from slmops.errors import ModelError, TransientError, explain_os_errors
from slmops.progress import Progress, log
from slmops.training import ranks
from slmops.training.attention import trainable_attention
from slmops.training.batches import Batch, Row, batches_by_length, collate, plan_batches
from slmops.training.config import TrainingConfig
from slmops.training.head import SparseHead

MAX_CURVE_POINTS = 200
NUM_VALIDATIONS = 3
MAX_VALIDATION_ROWS = 48
CHECKPOINT = "checkpoint.pt"

Loss = Callable[[torch.Tensor, Batch], torch.Tensor]
"""Sum of the loss over the N positions of a batch, given the student's logits [N, V]."""


@dataclass
class Curves:
    """What a training run leaves behind for people to look at."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss per token) of each step."""
    validation: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean cross-entropy per token on held-out rows)."""
    num_tokens: int = 0
    """Tokens that were not padding, over all steps."""
    seconds: float = 0.0
    """Time in training steps, over all resumed runs."""

    def facts(self) -> dict[str, object]:
        """The curves thinned to what a plot can show."""
        stride = math.ceil(len(self.loss) / MAX_CURVE_POINTS) or 1
        return {
            "loss_curve": [[step, round(value, 5)] for step, value in self.loss[::stride]],
            "validation_curve": [[step, round(value, 5)] for step, value in self.validation],
            "final_loss": round(self.loss[-1][1], 5),
            "validation_loss": round(self.validation[-1][1], 5),
            "num_steps": self.loss[-1][0],
            "num_tokens": self.num_tokens,
            "tokens_per_s": round(self.num_tokens / max(self.seconds, 1e-9), 1),
        }


@dataclass
class Task:
    """Everything a training run needs; `train` only runs it."""

    model: PreTrainedModel
    loss: Loss
    rows: Sequence[Row]
    validation_rows: Sequence[Row]
    config: TrainingConfig
    compute_dtype: torch.dtype
    pad_token_id: int
    work_dir: Path


def train(task: Task, what: str) -> Curves:
    """Run all steps, going on from the checkpoint in `task.work_dir` if there is one.

    The same settings and rows give the same steps, whether or not the run was killed in between, and but for dropout
    whether one process runs them or several (see `ranks`). All of them return the same curves, but only the first
    process validates, writes checkpoints and shows progress.

    Raises:
        ModelError: the loss is no longer finite.
        DiskFullError: a checkpoint cannot be written.
        TransientError: of several processes, one is lost, or does not see the same work.
    """
    config = task.config
    num_steps = max(1, math.ceil(config.num_epochs * len(task.rows) / config.batch_size))
    plan = plan_batches(task.rows, config.batch_size, num_steps, config.seed)
    head = SparseHead(task.model)
    optimizer = make_optimizer(task.model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, num_steps, config))
    curves = Curves()
    first = _restore(task, optimizer, schedule, curves)
    if not ranks.agree((task.work_dir.name, first, len(plan))):
        raise TransientError(
            f"the training's processes do not see the same work in {task.work_dir} (this one is at step {first}); "
            "is it on a volume that all of them share?"
        )
    validate_at = {round(part * num_steps / (NUM_VALIDATIONS - 1)) for part in range(NUM_VALIDATIONS)}
    saved_at = time.monotonic()
    leads = ranks.rank() == 0

    def validate(step: int) -> None:
        if leads and step in validate_at and all(at != step for at, _ in curves.validation):
            curves.validation.append((step, validation_loss(task, head)))

    with (
        trainable_attention(task.model, task.compute_dtype),
        Progress(what, num_steps, "steps", done=first) as progress,
    ):
        for step in range(first, num_steps):
            validate(step)
            started = time.monotonic()
            loss = _step(task, head, optimizer, plan[step], step)
            schedule.step()
            curves.seconds += time.monotonic() - started
            curves.num_tokens += sum(len(row.input_ids) for row in plan[step])
            curves.loss.append((step + 1, loss))
            if not leads:
                continue
            progress.advance(note=f"loss {loss:.3f}, {curves.num_tokens / curves.seconds:.0f} tokens/s")
            if time.monotonic() - saved_at >= config.checkpoint_interval_s:
                _save(task, optimizer, schedule, curves)
                saved_at = time.monotonic()
        validate(num_steps)
    if leads:
        _save(task, optimizer, schedule, curves)
    return curves


def where(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Facts about what a training ran on."""
    return {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "num_processes": ranks.size(),
    }


def make_optimizer(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters (Loshchilov and Hutter 2019, arXiv:1711.05101); decay on matrices only."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_factor(step: int, num_steps: int, config: TrainingConfig) -> float:
    """Linear rise over the warm-up, then cosine to a tenth."""
    warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def validation_loss(task: Task, head: SparseHead) -> float:
    """Mean cross-entropy per token, in nats, on the first held-out rows."""
    task.model.eval()
    total, count = 0.0, 0
    rows = task.validation_rows[:MAX_VALIDATION_ROWS]
    for batch in batches_by_length(rows, task.config.micro_batch_size, task.pad_token_id, task.model.device):
        with _autocast(task):
            logits = head.logits(batch)
        total += F.cross_entropy(logits, batch.target_ids, reduction="sum").item()
        count += len(batch.target_ids)
    return total / count


def _step(task: Task, head: SparseHead, optimizer: torch.optim.Optimizer, rows: Sequence[Row], step: int) -> float:
    """One optimizer step on this process's share of `rows`; returns the mean loss per token of all of them.

    Micro-batches are weighted by their share of the step's tokens, so their gradients add up: over the micro-batches of
    one process as over the processes.
    """
    task.model.train()
    torch.manual_seed(ranks.seed(task.config.seed, step))
    num_targets = sum(len(row.targets) for row in rows)
    size = task.config.micro_batch_size
    mine = ranks.share(rows)
    total = 0.0
    for start in range(0, len(mine), size):
        batch = collate(mine[start : start + size], task.pad_token_id, task.model.device)
        with _autocast(task):
            logits = head.logits(batch)
        loss = task.loss(logits, batch) / num_targets
        loss.backward()
        total += loss.item()
    total = ranks.sum_number(total, task.model.device)
    if not math.isfinite(total):
        raise ModelError(
            f"the loss of step {step + 1} is {total}; the rows of its batch are {[row.index for row in rows]}. "
            "Lower learning_rate, or look at these rows"
        )
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ranks.sum_gradients(trainable)
    torch.nn.utils.clip_grad_norm_(trainable, task.config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _autocast(task: Task) -> torch.autocast:
    enabled = task.compute_dtype != torch.float32
    return torch.autocast(task.model.device.type, dtype=task.compute_dtype if enabled else None, enabled=enabled)


def _save(
    task: Task, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR, curves: Curves
) -> None:
    """Write a checkpoint so that a kill leaves either this one or the one before."""
    path = task.work_dir / CHECKPOINT
    state = {
        "weights": {name: p.data for name, p in task.model.named_parameters() if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "curves": vars(curves),
    }
    partial = path.with_suffix(".partial")
    with explain_os_errors(path):
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # torch's writer wraps the operating system's error in one of its own
            partial.unlink(missing_ok=True)
            raise OSError(28, str(error), str(partial)) from error
        os.replace(partial, path)


def _restore(
    task: Task, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR, curves: Curves
) -> int:
    """Load the checkpoint, if there is one; return the number of steps that are done."""
    path = task.work_dir / CHECKPOINT
    if not path.exists():
        return 0
    state = torch.load(path, map_location=task.model.device, weights_only=True)
    parameters = dict(task.model.named_parameters())
    for name, weights in state["weights"].items():
        parameters[name].data.copy_(weights)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    vars(curves).update(state["curves"])
    log.info("going on after step %d, from the checkpoint in %s", curves.loss[-1][0], task.work_dir)
    return curves.loss[-1][0]
