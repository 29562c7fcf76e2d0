"""The vocabulary of a domain: its text is cut as before, any other text still goes in and comes out, and nothing stays
that no text leads to."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.trainers import Trainer

from slmops.demo import building_commands
from slmops.errors import ConfigError, ModelError
from slmops.shaping.vocabulary import Vocabulary, check_byte_level, choose_vocabulary, shrink_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [f"{row['request']} {row['command']}" for row in building_commands.make_rows(400, seed=3)]
WORDS = sorted({word for text in CORPUS for word in text.split()})
SPLIT = Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[^\r\n\p{L}\p{N}]?\p{L}+|\s+")
KINDS = ("gpt2", "qwen", "llama3", "few bytes")


@cache
def tokenizer_of(kind: str) -> dict[str, Any]:
    """A tokenizer.json of 900 tokens, as the model families have them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    by_regex = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.pre_tokenizer = (
        by_regex if kind in ("qwen", "llama3") else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    tokenizer.decoder = decoders.ByteLevel()
    first, alphabet = (SPECIAL, sorted(pre_tokenizers.ByteLevel.alphabet())) if kind == "gpt2" else ([], [])
    if kind in ("qwen", "llama3"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=900, special_tokens=first, initial_alphabet=alphabet, show_progress=False),
    )
    if not first:
        tokenizer.add_special_tokens([AddedToken(token) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("fortnight", single_word=True, normalized=False)])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    if kind == "llama3":
        content["model"]["merges"] = every_merge(content["model"]["vocab"])
        number = tokenizer.token_to_id("<|im_start|>")
        around = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", number)])
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), around])
        content = json.loads(tokenizer.to_str())
    return content


def every_merge(vocab: dict[str, int]) -> list[list[str]]:
    """All ways to make each token of two, as converters of tiktoken's files write them: the rank is the result's."""
    splits = [
        (vocab[token], vocab[token[:at]], vocab[token[at:]], [token[:at], token[at:]])
        for token in vocab
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    return [merge for *_, merge in sorted(splits)]


def cut(
    kind: str, texts: list[str], *, min_size: int = 0, multiple: int = 1, num_rows: int = 1000
) -> tuple[Tokenizer, Tokenizer, Vocabulary]:
    """The tokenizer before and after, and what stayed."""
    content = tokenizer_of(kind)
    whole = Tokenizer.from_str(json.dumps(content))
    used = {number for text in texts for number in whole.encode(text).ids}
    vocabulary = choose_vocabulary(content, used, always=[], num_rows=num_rows, min_size=min_size, multiple=multiple)
    return whole, Tokenizer.from_str(json.dumps(shrink_tokenizer(content, vocabulary.ids))), vocabulary


a_word = st.sampled_from([*WORDS, "fortnight", *SPECIAL]) | st.text(min_size=1, max_size=8)
a_text = st.lists(a_word, max_size=12).flatmap(
    lambda words: st.sampled_from(["", " ", "\n"]).map(lambda s: s.join(words))
)
any_text = (
    st.text(max_size=40)
    | a_text
    | st.sampled_from(["\x00\x07\x7f", "👩‍👩‍👧‍👦🏳️‍🌈", "ﷺ e\u0301", "  \t\n\u2028", "x" * 500])
)


@pytest.mark.parametrize("kind", KINDS)
@given(domain=st.lists(a_text, min_size=1, max_size=5), other=any_text, min_size=st.integers(0, 600))
@settings(max_examples=60, deadline=None)
def test_text_of_the_domain_is_cut_as_before_and_any_other_comes_out_as_before(
    kind: str, domain: list[str], other: str, min_size: int
) -> None:
    whole, smaller, vocabulary = cut(kind, domain, min_size=min_size)
    place = {number: at for at, number in enumerate(vocabulary.ids)}
    for text in domain:
        assert smaller.encode(text).ids == [place[number] for number in whole.encode(text).ids]
    before, after = (each.decode(each.encode(other).ids, skip_special_tokens=False) for each in (whole, smaller))
    assert after == before
    assert len(vocabulary.ids) >= min_size


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_out_as_it_went_in_where_every_byte_is_a_token(kind: str, text: str) -> None:
    _, smaller, _ = cut(kind, ["turn on the light"])
    assert smaller.decode(smaller.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("min_size", [0, 512])
def test_every_token_that_stays_can_be_reached_and_every_added_one_stays(kind: str, min_size: int) -> None:
    whole, smaller, vocabulary = cut(kind, CORPUS[:3], min_size=min_size)
    added = {entry["content"] for entry in json.loads(smaller.to_str())["added_tokens"]}
    assert added == {*SPECIAL, "fortnight"}
    assert sorted(smaller.get_vocab(with_added_tokens=True).values()) == list(range(len(vocabulary.ids)))
    for token, number in smaller.get_vocab(with_added_tokens=False).items():
        if token not in added:
            assert [number] == [found.id for found in smaller.model.tokenize(token)], token
    numbers = smaller.get_vocab()
    assert all(whole.token_to_id(token) == vocabulary.ids[numbers[token]] for token in added)


def test_special_tokens_in_front_stay_in_front_in_their_order() -> None:
    _, smaller, _ = cut("gpt2", CORPUS[:3])
    assert [smaller.token_to_id(token) for token in SPECIAL] == [0, 1, 2]


def test_what_used_tokens_are_merged_from_stays_and_merges_keep_their_order() -> None:
    """The one token of " thermostat" needs every token on the way to it."""
    whole, smaller, vocabulary = cut("gpt2", [" thermostat"])
    assert [whole.id_to_token(number) for number in whole.encode(" thermostat").ids] == ["Ġthermostat"]
    before, after = (json.loads(each.to_str())["model"]["merges"] for each in (whole, smaller))
    assert 0 < len(after) < 12
    assert after == [merge for merge in before if merge in after]
    assert vocabulary.num_used == 1
    assert vocabulary.num_filled == 0


def test_the_size_is_filled_up_with_the_most_common_tokens() -> None:
    """Those of the first merges, each of which has its parts already."""
    whole, smaller, vocabulary = cut("gpt2", ["7"], min_size=310, multiple=64)
    assert len(vocabulary.ids) == 320
    merges = [left + right for left, right in json.loads(whole.to_str())["model"]["merges"]]
    filled = {token for token in smaller.get_vocab() if len(token) > 1} - {*SPECIAL, "fortnight"}
    assert filled == set(merges[: len(filled)])
    assert vocabulary.num_filled == len(filled)


def test_rows_without_a_token_fill_up_last_and_no_size_is_beyond_the_model() -> None:
    everything = [" ".join(WORDS), *CORPUS]
    _, smaller, vocabulary = cut("gpt2", everything, min_size=950, multiple=960, num_rows=960)
    assert vocabulary.ids == list(range(960))
    assert smaller.get_vocab_size() < 960
    _, _, vocabulary = cut("gpt2", everything, min_size=950, multiple=512, num_rows=960)
    assert vocabulary.ids == list(range(960))


def test_a_token_that_no_text_leads_to_does_not_fill_up() -> None:
    """In "abc" the letters b and c merge first, so nothing ever becomes the token abc."""
    vocab = {token: number for number, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "bc", "ab"])}
    vocab |= {"abc": 258, "xy": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "c"), ("a", "b"), ("ab", "c"), ("x", "y")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert tokenizer.encode("abc").tokens == ["a", "bc"]
    content = json.loads(tokenizer.to_str())
    ids = choose_vocabulary(content, [], always=[], num_rows=260, min_size=259, multiple=1).ids
    assert ids == [number for number in range(260) if number != vocab["abc"]]


def test_merges_of_older_files_are_read() -> None:
    content = json.loads(json.dumps(tokenizer_of("gpt2")))
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    used = Tokenizer.from_str(json.dumps(content)).encode(CORPUS[0]).ids
    asked: dict[str, Any] = {"always": [], "num_rows": 1000, "min_size": 0, "multiple": 8}
    assert choose_vocabulary(content, used, **asked) == choose_vocabulary(tokenizer_of("gpt2"), used, **asked)


def test_ids_in_padding_and_around_texts_are_renumbered() -> None:
    content = json.loads(json.dumps(tokenizer_of("llama3")))
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<|im_end|>"), pad_token="<|im_end|>", length=4)
    content = json.loads(tokenizer.to_str())
    ids = choose_vocabulary(content, [], always=[], num_rows=1000, min_size=0, multiple=1).ids
    smaller = Tokenizer.from_str(json.dumps(shrink_tokenizer(content, ids)))
    assert smaller.encode("a").tokens == ["<|im_start|>", "a", "<|im_end|>", "<|im_end|>"]
    assert smaller.encode("a").ids == [smaller.token_to_id(token) for token in smaller.encode("a").tokens]
    classic = content | {
        "post_processor": {"type": "RobertaProcessing", "sep": ["<|im_end|>", ids[-2]], "cls": ["a", 0]}
    }
    assert shrink_tokenizer(classic, ids)["post_processor"]["sep"] == ["<|im_end|>", len(ids) - 2]


def trained(model: Any, trainer: Trainer, *, byte_level: bool = False) -> dict[str, Any]:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel() if byte_level else pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS[:50], trainer)
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (trained(models.Unigram(), trainers.UnigramTrainer(vocab_size=90, show_progress=False)), "a Unigram tokenizer"),
        (trained(models.WordPiece(), trainers.WordPieceTrainer(vocab_size=90, show_progress=False)), "a WordPiece tok"),
        (trained(models.BPE(), trainers.BpeTrainer(vocab_size=90, show_progress=False)), "of characters, not of bytes"),
        (
            tokenizer_of("gpt2") | {"model": tokenizer_of("gpt2")["model"] | {"byte_fallback": True}},
            "with byte_fallback",
        ),
        (tokenizer_of("gpt2") | {"model": tokenizer_of("gpt2")["model"] | {"dropout": 0.1}}, "with dropout"),
        (tokenizer_of("gpt2") | {"decoder": None}, "of characters, not of bytes"),
        ({}, "a nameless tokenizer"),
    ],
)
def test_other_tokenizers_are_refused_by_name(content: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=f"{complaint}.*vocabulary=kept"):
        check_byte_level(content)


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_vocab_size=1000 leaves out none of the model's 1000 tokens"):
        cut("gpt2", ["a"], min_size=1000)
    with pytest.raises(ModelError, match="ids up to 900, but the model's embedding has only 512 rows"):
        cut("gpt2", ["a"], num_rows=512)
