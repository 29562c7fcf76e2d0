"""Lengths in tokens, by the student's own tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from slmops.errors import ModelError
from slmops.models import tokenizer_digest
from slmops.prepare_data.tokens import TokenCounter


def test_it_counts_as_the_models_own_tokenizer_does(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["Where is my card?", "", "Grüße 你好 👩\u200d👧", "a" * 5000, "<|im_start|>user"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    counter = TokenCounter(str(tiny_model), tmp_path)
    counts = counter.count(texts)
    assert counts.dtype == np.int32
    assert counts.tolist() == [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert (counter.name, counter.digest) == (tiny_model.name, tokenizer_digest(tiny_model))
    assert counter.count([]).shape == (0,)


def test_truncation_and_padding_of_the_file_do_not_change_counts(tiny_model: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["a", "one two three four five six seven eight nine ten"]
    assert (
        TokenCounter(str(tmp_path), tmp_path).count(texts).tolist()
        == TokenCounter(str(tiny_model), tmp_path).count(texts).tolist()
    )


def test_a_directory_without_a_tokenizer_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json; give the directory of a model"):
        TokenCounter(str(tmp_path), tmp_path)
    shutil.copy(tiny_model / "tokenizer.json", tmp_path)
    damaged = (tmp_path / "tokenizer.json").read_text()[:1000]
    (tmp_path / "tokenizer.json").write_text(damaged)
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read .*save the model's tokenizer again"):
        TokenCounter(str(tmp_path), tmp_path)
