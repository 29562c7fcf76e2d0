"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from slmops.training.config import TrainingConfig


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over those that are trained (Loshchilov and Hutter 2019, arXiv:1711.05101); decay on matrices only."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, num_steps: int, config: TrainingConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate of each of `num_steps` steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, num_steps, config))


def learning_rate_factor(step: int, num_steps: int, config: TrainingConfig) -> float:
    """Linear rise over the warm-up, then cosine to a tenth (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
