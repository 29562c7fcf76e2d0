"""Which tokens carry loss, and how rows become batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slmops.errors import DataError
from slmops.records import ChatRecord, Message
from slmops.torch_models import load_tokenizer
from slmops.training.batches import Row, collate, common_prefix, encode_row, encode_rows, plan_batches
from tests.datasets import chat_record, commands


def test_loss_is_on_the_answer_and_its_end_only(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    row = encode_row(tokenizer, chat_record("turn on the light", "on light"))
    learned = tokenizer.decode([row.input_ids[position] for position in row.targets])
    assert learned == "on light<|im_end|>"
    assert row.targets[-1] == len(row.input_ids) - 1


def test_every_turn_of_the_assistant_is_learned_or_only_the_last(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    turns = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second")]
    record = ChatRecord(
        id="0" * 16, messages=tuple(Message.model_validate({"role": role, "content": text}) for role, text in turns)
    )

    def learned(last_turn_only: bool) -> str:
        row = encode_row(tokenizer, record, last_turn_only=last_turn_only)
        return str(tokenizer.decode([row.input_ids[position] for position in row.targets]))

    assert learned(False) == "first<|im_end|>second<|im_end|>"
    assert learned(True) == "second<|im_end|>"


def test_a_batch_predicts_each_target_from_the_position_before_it(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    rows = encode_rows(tokenizer, commands(7), 512)
    batch = collate(rows, 0, torch.device("cpu"))
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.predict_from + 1], batch.target_ids)
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum().item() == sum(len(row.input_ids) for row in rows)


def test_what_rows_begin_with_is_left_out_once_they_share_enough_of_it() -> None:
    rows = [Row(0, [1, 2, 3, 4, 5, 6, 7], [6]), Row(1, [1, 2, 3, 4, 5, 8, 9, 10], [6, 7])]
    batch = collate(rows, 0, torch.device("cpu"), shared_prefix=True)
    assert batch.prefix_ids is not None
    assert batch.attention_mask is not None
    assert batch.prefix_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.input_ids.tolist() == [[6, 7, 0], [8, 9, 10]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.input_ids.flatten()[batch.predict_from].tolist() == [6, 8, 9], "the tokens before the targets"
    assert batch.target_ids.tolist() == [7, 9, 10]
    assert common_prefix(rows[:1]) == 0, "a row alone shares with nobody"
    assert common_prefix([Row(0, [1, 2, 3, 4, 5], [3]), Row(1, [1, 2, 3, 4, 6], [4])]) == 0, "two tokens are too few"
    alike = [Row(number, [1, 2, 3, 4, 5, 6], [5]) for number in range(2)]
    assert common_prefix(alike) == 4, "the token before the first target stays, so that it is predicted from"


def test_rows_that_a_template_leaves_nothing_of_to_learn_are_left_out(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' or 'light' in m.content %}{{ m.content }}{% endif %}{% endfor %}"
    )
    pairs = [("turn on the light", "on light"), ("turn on the fan", "on fan")]
    rows = encode_rows(tokenizer, [chat_record(*pair) for pair in pairs], 512)
    assert [row.index for row in rows] == [0]
    with pytest.raises(DataError, match="none of the 1 rows has a token to learn"):
        encode_rows(tokenizer, [chat_record(*pairs[1])], 512)


def test_a_plan_repeats_with_its_seed_and_holds_every_row_once_an_epoch(tiny_model: Path) -> None:
    rows = encode_rows(load_tokenizer(tiny_model), commands(50), 512)
    plan = plan_batches(rows, batch_size=8, num_steps=14, seed=3)
    assert plan == plan_batches(rows, batch_size=8, num_steps=14, seed=3)
    assert plan != plan_batches(rows, batch_size=8, num_steps=14, seed=4)
    first_epoch = sorted(row.index for batch in plan[:7] for row in batch)
    assert first_epoch == list(range(50))
    assert [row.index for batch in plan[:7] for row in batch] != [row.index for batch in plan[7:] for row in batch]


def test_rows_that_are_all_too_long_are_an_error_that_says_how_long(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    with pytest.raises(DataError, match=r"all 3 rows are longer than max_length=4 tokens; the longest has \d+"):
        encode_rows(tokenizer, commands(3), 4)
