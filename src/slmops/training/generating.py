"""Answers of a model that is being trained: to see how good it is, and to learn from its own mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slmops.records import ChatRecord
from slmops.tasks.registry import Tasks
from slmops.training.batches import encode, pad_left
from slmops.training.config import TrainingConfig


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float | None = None,
) -> list[list[int]]:
    """Answers in tokens, up to the end of the turn, which is their last token unless they are cut.

    Args:
        model: in any mode; it is left in the same.
        tokenizer: the model's.
        prompts: token ids.
        max_new_tokens: longest answer.
        temperature: of the draw, from torch's own random numbers; None takes the likeliest token each time.
    """
    chosen: dict[str, Any] = {"do_sample": False, "temperature": None}
    if temperature is not None:
        chosen = {"do_sample": True, "temperature": temperature}
    with _answering(model):
        inputs = pad_left(prompts, tokenizer.pad_token_id, model.device)
        output = model.generate(  # type: ignore[operator]
            **inputs,
            **chosen,
            top_p=None,
            top_k=0 if temperature is not None else None,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_until(answer, tokenizer.eos_token_id) for answer in answers]


def make_metric(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[ChatRecord], config: TrainingConfig
) -> Callable[[], float] | None:
    """The share of the first `num_metric_rows` records that `model` answers right, as their tasks say.

    Raises:
        ConfigError: a task is unknown, or its settings are wrong.
    """
    chosen = records[: config.num_metric_rows]
    if not chosen:
        return None
    tasks = Tasks(config.task_settings)
    judges = [tasks.of(record) for record in chosen]
    prompts = [encode(tokenizer, record.prompt, to_answer=True) for record in chosen]

    def metric() -> float:
        right = 0
        order = sorted(range(len(chosen)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), config.micro_batch_size):
            indices = order[start : start + config.micro_batch_size]
            answers = generate(
                model, tokenizer, [prompts[index] for index in indices], max_new_tokens=config.max_metric_tokens
            )
            for index, answer in zip(indices, answers, strict=True):
                text = str(tokenizer.decode(answer, skip_special_tokens=True))
                right += judges[index].correct(text, chosen[index].completion)
        return right / len(chosen)

    return metric


@contextmanager
def _answering(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and without recomputing activations, which would leave no cache of keys and values."""
    training, checkpointed = model.training, model.is_activation_checkpointing
    if checkpointed:
        model.activation_checkpointing_disable()
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if checkpointed:
            model.activation_checkpointing_enable()


def _until(answer: list[int], end: int) -> list[int]:
    return answer[: answer.index(end) + 1] if end in answer else answer
