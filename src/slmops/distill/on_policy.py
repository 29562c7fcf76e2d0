"""Steps in which the student learns on its own answers (GKD, Agarwal et al. 2024, arXiv:2306.13649)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slmops.distill.config import DistillConfig
from slmops.training.batches import Row
from slmops.training.generating import generate


def fraction(progress: float, config: DistillConfig) -> float:
    """The share of steps that are on-policy when the run is `progress` (0 to 1) done: a straight line."""
    return config.on_policy_start + (config.on_policy_end - config.on_policy_start) * progress


def is_on_policy(step: int, progress: float, config: DistillConfig) -> bool:
    """Whether a step is: by chance that belongs to its number, so alike in all processes and after a kill."""
    return random.Random(f"{config.seed}/on-policy/{step}").random() < fraction(progress, config)


def own_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: DistillConfig
) -> Callable[[int, float, Sequence[Row]], Sequence[Row]] | None:
    """The rows of a step, with the student's own answers in on-policy steps; None if there are no such steps."""
    if config.on_policy_start == config.on_policy_end == 0:
        return None

    def choose(step: int, progress: float, rows: Sequence[Row]) -> Sequence[Row]:
        if not rows or not is_on_policy(step, progress, config):
            return rows
        prompts = [row.input_ids[: row.targets[0]] for row in rows]
        answers: list[list[int]] = []
        for start in range(0, len(prompts), config.micro_batch_size):
            answers += generate(
                model,
                tokenizer,
                prompts[start : start + config.micro_batch_size],
                max_new_tokens=config.max_answer_tokens,
                temperature=config.answer_temperature,
            )
        return [
            Row(row.index, prompt + answer, list(range(len(prompt), len(prompt) + len(answer))))
            for row, prompt, answer in zip(rows, prompts, answers, strict=True)
        ]

    return choose
