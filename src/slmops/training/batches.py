"""From chat records to padded batches: which tokens carry loss, and which rows go together."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from slmops.errors import DataError, ModelError
from slmops.progress import log
from slmops.records import ChatRecord

MIN_PREFIX = 4
"""Common tokens that are worth a forward pass of their own."""


@dataclass(frozen=True)
class Row:
    """One encoded conversation."""

    index: int
    """Position of the record in its data set."""
    input_ids: list[int]
    targets: list[int]
    """Positions in `input_ids` that the model is to predict, in rising order."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right, or packed one behind the other: B rows of L tokens, N of them with loss."""

    rows: list[Row]
    input_ids: torch.Tensor
    """[B, L] token ids; B is 1 if packed."""
    attention_mask: torch.Tensor | None
    """[B, L] 1 for a token, 0 for padding; None if packed."""
    position_ids: torch.Tensor | None
    """[1, L] from 0 in each packed row: transformers keeps rows apart where they start again. None if padded."""
    predict_from: torch.Tensor
    """[N] positions in the flattened [B * L] hidden states from which a target is predicted."""
    target_ids: torch.Tensor
    """[N] the tokens to predict."""
    prefix_ids: torch.Tensor | None = None
    """[1, P] tokens with which every row begins, and which are left out of `input_ids`; None if there are none."""


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, to_answer: bool) -> list[int]:
    """Token ids of a conversation; with `to_answer`, up to where the assistant's next turn begins."""
    encoded: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=to_answer, return_dict=True)
    return list(encoded["input_ids"])


def encode_row(
    tokenizer: PreTrainedTokenizerBase, record: ChatRecord, index: int = 0, *, last_turn_only: bool = False
) -> Row:
    """Encode a conversation, with loss on the assistant's tokens and the token that ends a turn, and nothing else.

    Raises:
        ModelError: the chat template changes earlier turns when a later one is added, so no token can be told apart.
    """
    messages = [message.model_dump() for message in record.messages]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    ids: list[int] = []
    targets: list[int] = []
    for number in turns[-1:] if last_turn_only else turns:
        prompt = encode(tokenizer, messages[:number], to_answer=True)
        ids = encode(tokenizer, messages[: number + 1], to_answer=False)
        if ids[: len(prompt)] != prompt:
            raise ModelError(
                "the chat template does not continue the prompt with the answer, so the answer's tokens cannot be told "
                "apart; use a template that renders turns one after the other"
            )
        end = _end_of_turn(ids, len(prompt), tokenizer.eos_token_id)
        targets.extend(range(len(prompt), end))
    return Row(index=index, input_ids=ids[: targets[-1] + 1] if targets else ids, targets=targets)


def retokenizes(tokenizer: PreTrainedTokenizerBase, record: ChatRecord, answer: Sequence[int]) -> bool:
    """Whether the text of the last turn turns into the tokens `answer`, the end of the turn included, again."""
    row = encode_row(tokenizer, record, last_turn_only=True)
    return [row.input_ids[position] for position in row.targets] == list(answer)


def _end_of_turn(ids: list[int], start: int, eos_token_id: int | None) -> int:
    """The position after the first end-of-turn token; what templates add behind it (a line break) is no answer."""
    for position in range(start, len(ids)):
        if ids[position] == eos_token_id:
            return position + 1
    return len(ids)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[ChatRecord], max_length: int, *, last_turn_only: bool = False
) -> list[Row]:
    """Encode all records; those longer than `max_length` tokens, or with nothing to learn, are left out and counted.

    Raises:
        DataError: none is left.
    """
    rows = [encode_row(tokenizer, record, index, last_turn_only=last_turn_only) for index, record in enumerate(records)]
    if empty := [row.index for row in rows if not row.targets]:
        log.info("%d rows have no token to learn and are left out, first row %d", len(empty), empty[0])
        if len(empty) == len(rows):
            raise DataError(
                f"none of the {len(rows)} rows has a token to learn: the chat template renders the assistant's turn to "
                "nothing; correct the template"
            )
    rows = [row for row in rows if row.targets]
    kept = [row for row in rows if len(row.input_ids) <= max_length]
    if len(kept) < len(rows):
        log.info("%d of %d rows are longer than %d tokens and left out", len(rows) - len(kept), len(rows), max_length)
    if not kept:
        longest = max(len(row.input_ids) for row in rows)
        raise DataError(
            f"all {len(rows)} rows are longer than max_length={max_length} tokens; the longest has {longest}"
        )
    return kept


def plan_batches(rows: Sequence[Row], batch_size: int, num_steps: int, seed: int) -> list[list[Row]]:
    """The rows of every step: each epoch in another order, the rows of a step by length; repeats with its seed.

    The forward passes of a step then hold rows of similar length, and the steps rows of all lengths: length often goes
    with kind, and steps of one kind each train worse than they save in padding.
    """
    plan: list[list[Row]] = []
    epoch = 0
    while len(plan) < num_steps:
        shuffled = random.Random(f"{seed}/{epoch}").sample(list(rows), len(rows))
        plan += [
            sorted(shuffled[start : start + batch_size], key=lambda row: len(row.input_ids))
            for start in range(0, len(shuffled), batch_size)
        ]
        epoch += 1
    return plan[:num_steps]


def collate(
    rows: Sequence[Row],
    pad_token_id: int,
    device: torch.device,
    *,
    packed: bool = False,
    shared_prefix: bool = False,
) -> Batch:
    """Put rows into one batch and find where loss is.

    Args:
        rows: what to put together.
        pad_token_id: fills rows up.
        device: where the tensors go.
        packed: whether rows stand one behind the other, without padding.
        shared_prefix: whether padded rows leave out the tokens with which all of them begin.
    """
    if packed:
        return _pack(rows, device)
    return _pad(rows, pad_token_id, device, common_prefix(rows) if shared_prefix else 0)


def common_prefix(rows: Sequence[Row]) -> int:
    """How many first tokens all rows have in common, before any from which a target is predicted.

    Few are not worth a pass of their own, and one row shares with nobody: then it is 0.
    """
    limit = min(row.targets[0] - 1 for row in rows)
    columns = zip(*(row.input_ids[:limit] for row in rows), strict=False)
    length = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return length if len(rows) > 1 and length >= MIN_PREFIX else 0


def _pad(rows: Sequence[Row], pad_token_id: int, device: torch.device, prefix: int) -> Batch:
    length = max(len(row.input_ids) for row in rows) - prefix
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    predict_from: list[int] = []
    target_ids: list[int] = []
    for number, row in enumerate(rows):
        own = row.input_ids[prefix:]
        input_ids[number, : len(own)] = torch.tensor(own)
        attention_mask[number, : len(own)] = 1
        predict_from += [number * length + position - prefix - 1 for position in row.targets]
        target_ids += [row.input_ids[position] for position in row.targets]
    return Batch(
        rows=list(rows),
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        position_ids=None,
        predict_from=torch.tensor(predict_from, device=device),
        target_ids=torch.tensor(target_ids, device=device),
        prefix_ids=torch.tensor([rows[0].input_ids[:prefix]], device=device) if prefix else None,
    )


def _pack(rows: Sequence[Row], device: torch.device) -> Batch:
    starts = list(accumulate((len(row.input_ids) for row in rows), initial=0))
    return Batch(
        rows=list(rows),
        input_ids=torch.tensor([[token for row in rows for token in row.input_ids]], device=device),
        attention_mask=None,
        position_ids=torch.tensor([[at for row in rows for at in range(len(row.input_ids))]], device=device),
        predict_from=torch.tensor(
            [start + position - 1 for row, start in zip(rows, starts, strict=False) for position in row.targets],
            device=device,
        ),
        target_ids=torch.tensor([row.input_ids[at] for row in rows for at in row.targets], device=device),
    )


def batches_by_length(
    rows: Sequence[Row], batch_size: int, pad_token_id: int, device: torch.device, *, packed: bool = False
) -> Iterator[Batch]:
    """All rows once, rows of similar length together."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    for start in range(0, len(ordered), batch_size):
        yield collate(ordered[start : start + batch_size], pad_token_id, device, packed=packed)


def pad_left(prompts: Sequence[list[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` [B, L] of prompts that end together, as generation needs them."""
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for number, prompt in enumerate(prompts):
        input_ids[number, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[number, length - len(prompt) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
