"""prepare_data decides what stays and where: near duplicates, groups, leaks, lengths in tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.errors import ModelError
from slmops.prepare_data.duplicates import SHINGLE_WORDS, Clusters, MinHasher
from slmops.prepare_data.words import hash_runs, hash_words
from tests.prepared import WORDS, all_records, jsonl, prepare, prompts, sentences, set_aside


def rows_of(texts: list[str], completion: str = "yes") -> list[dict[str, Any]]:
    return [{"prompt": text, "completion": completion} for text in texts]


def changed(text: str, seed: int = 0) -> str:
    """The text with its last word replaced, and in other letters and marks: 25 of 27 runs of five words stay."""
    return (" ".join([*text.split()[:-1], f"other{seed}"]) + "!").upper()


def splits_of(tmp_path: Path) -> dict[str, str]:
    return {prompt: split for split in ("train", "validation", "test") for prompt in prompts(tmp_path, split)}


def test_near_duplicates_are_removed_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    texts = sentences(100)
    rows = rows_of([*texts, *map(changed, texts[:10]), changed(texts[3], 2)])
    prepared = prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", rows), near_duplicates="remove")
    facts = prepared.train.facts
    assert facts["num_near_duplicates"] == facts["num_near_duplicates_removed"] == 11
    assert facts["num_near_duplicate_clusters"] == 10
    assert len(all_records(tmp_path)) == 100
    aside = set_aside(tmp_path)
    assert len(aside) == 11
    assert {row["stage"] for row in aside} == {"near duplicates"}
    assert all(row["reason"].startswith(f"near duplicate of {tmp_path}/rows.jsonl:") for row in aside)
    kept = {split: prompts(tmp_path, split) for split in ("train", "validation", "test")}
    random.Random(1).shuffle(rows)
    mixed = prepare(tmp_path, jsonl(tmp_path / "mixed.jsonl", rows), near_duplicates="remove")
    assert kept == {split: prompts(tmp_path, split) for split in kept}
    assert mixed.test.digest == prepared.test.digest


def test_near_duplicates_that_stay_are_in_one_split(tmp_path: Path) -> None:
    texts = sentences(60)
    source = jsonl(tmp_path / "rows.jsonl", rows_of([*texts, *map(changed, texts)]))
    facts = prepare(tmp_path, source, leakage="off").train.facts
    assert facts["num_near_duplicates"] == 60
    assert facts["num_near_duplicates_removed"] == 0
    found = splits_of(tmp_path)
    assert len(found) == 120
    assert all(found[text] == found[changed(text)] for text in texts)
    assert prepare(tmp_path, source, near_duplicates="off", leakage="off").train.facts["num_near_duplicates"] == 0
    found = splits_of(tmp_path)
    assert any(found[text] != found[changed(text)] for text in texts), "the test can fail"


def test_what_all_rows_share_does_not_make_them_alike(tmp_path: Path) -> None:
    long_template = " ".join(sentences(1, 80)) + " {prompt}"
    source = jsonl(tmp_path / "rows.jsonl", rows_of(sentences(50, num_words=8, seed=2)))
    facts = prepare(
        tmp_path, source, prompt_template=long_template, system_prompt=" ".join(sentences(1, 80, seed=3))
    ).train.facts
    assert facts["num_near_duplicates"] == facts["num_leaked"] == 0


def test_rows_of_a_marked_test_stay_and_their_near_copies_leave_train(tmp_path: Path) -> None:
    texts = sentences(40)
    rows = [row | {"split": "train" if i < 30 else "test"} for i, row in enumerate(rows_of(texts))]
    rows += [row | {"split": "train"} for row in rows_of([changed(text) for text in texts[35:]])]
    source = jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare(tmp_path, source, split_by="column", near_duplicates="remove")
    assert prompts(tmp_path, "test") == set(texts[30:])
    assert prepared.train.facts["num_near_duplicates_removed"] == 5


def test_rows_of_one_group_stay_together(tmp_path: Path) -> None:
    rows = [row | {"customer": f"c{i // 4}"} for i, row in enumerate(rows_of(sentences(200)))]
    rows += [row | {"customer": None} for row in rows_of(sentences(40, seed=9))]
    prepared = prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", rows), group_by="customer")
    found = splits_of(tmp_path)
    for start in range(0, 200, 4):
        assert len({found[row["prompt"]] for row in rows[start : start + 4]}) == 1
    assert [sidecar.facts["num_rows"] for sidecar in prepared] == pytest.approx([204, 12, 24], abs=4)


@pytest.mark.parametrize("leakage", ["remove", "report", "off"])
def test_train_rows_with_words_of_test_are_leaks(tmp_path: Path, leakage: str) -> None:
    told = sentences(20, num_words=40)
    quoting = [f"{sentences(1, 30, seed=50 + i)[0]} {' '.join(text.split()[10:23])}" for i, text in enumerate(told[:5])]
    nearly = [f"{sentences(1, 30, seed=70 + i)[0]} {' '.join(text.split()[10:22])}" for i, text in enumerate(told[:5])]
    short = ["Hello, is it me?", "hello is it me"]
    train = [*sentences(60, seed=3), *quoting, *nearly, short[0]]
    rows = [row | {"split": "train"} for row in rows_of(train)]
    rows += [row | {"split": "validation"} for row in rows_of(sentences(5, seed=4))]
    rows += [row | {"split": "test"} for row in rows_of([*told, short[1]])]
    prepared = prepare(
        tmp_path, jsonl(tmp_path / "rows.jsonl", rows), split_by="column", leakage=leakage, near_duplicates="off"
    )
    left = set(train) - prompts(tmp_path, "train")
    assert left == ({*quoting, short[0]} if leakage == "remove" else set())
    assert prepared.train.facts["num_overlapping"] == (0 if leakage == "off" else 6)
    assert {row["stage"] for row in set_aside(tmp_path)} == ({"leaked by words"} if leakage == "remove" else set())
    assert prepared.test.facts["num_rows"] == 21


def test_an_instruction_that_many_prompts_repeat_is_no_leak(tmp_path: Path) -> None:
    instruction = " ".join(sentences(1, 30))
    rows = rows_of([f"{instruction} {text}" for text in sentences(100, num_words=12, seed=5)])
    source = jsonl(tmp_path / "rows.jsonl", rows)
    assert prepare(tmp_path, source, near_duplicates="off").train.facts["num_leaked"] == 0
    rows = [row | {"split": "test" if i < 20 else "train"} for i, row in enumerate(rows)]
    rows += [row | {"split": "train"} for row in rows_of([f"{rows[3]['prompt']} {rows[4]['prompt']} to the end"])]
    jsonl(source, rows)
    assert prepare(tmp_path, source, near_duplicates="off", split_by="column").train.facts["num_leaked"] == 0
    (shared,) = sentences(1, 15, seed=8)
    rows += [{"prompt": f"{instruction} {shared}", "completion": "yes", "split": "test"}]
    rows += [{"prompt": f"{shared} {instruction}", "completion": "yes", "split": "train"}]
    jsonl(source, rows)
    assert prepare(tmp_path, source, near_duplicates="off", split_by="column").train.facts["num_leaked"] == 1


def test_lengths_in_tokens_are_counted_and_limited(tmp_path: Path, tiny_model: Path) -> None:
    texts = [*sentences(50, num_words=10), *sentences(5, num_words=200, seed=1)]
    source = jsonl(tmp_path / "rows.jsonl", rows_of(texts))
    facts = prepare(tmp_path, source, tokenizer_uri=str(tiny_model)).train.facts
    assert facts["tokens_p50"] <= facts["tokens_p99"] <= facts["tokens_max"]
    assert facts["num_tokens"] > facts["num_rows"] * 10
    facts = prepare(tmp_path, source, tokenizer_uri=str(tiny_model), max_tokens=400).train.facts
    assert facts["tokens_max"] <= 400
    assert len(all_records(tmp_path)) == 50
    assert {row["reason"] for row in set_aside(tmp_path)} == {"too many tokens"}
    (tmp_path / "none").mkdir()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        prepare(tmp_path, source, tokenizer_uri=str(tmp_path / "none"))


def test_rows_in_other_languages_are_set_aside_and_tasks_are_written(tmp_path: Path) -> None:
    english = [f"Please tell me how I can find the nearest railway station, number {i}." for i in range(30)]
    german = [f"Bitte sagen Sie mir, wie ich den nächsten Bahnhof finden kann, Nummer {i}." for i in range(5)]
    rows = [
        row | {"task": "qa"} if i % 2 else row for i, row in enumerate(rows_of([*english, *german], "Yes, please."))
    ]
    prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", rows), languages=["en"], near_duplicates="off", leakage="off")
    found = all_records(tmp_path)
    assert {record.prompt[0]["content"] for record in found} == set(english)
    assert {row["reason"] for row in set_aside(tmp_path)} == {"language de"}
    assert {record.task for record in found} == {"chat", "qa"}


def test_the_facts_tell_the_balance_of_classes(tmp_path: Path) -> None:
    rows = [{"prompt": text, "completion": "abc"[min(i // 60, 2)]} for i, text in enumerate(sentences(200))]
    facts = prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", rows)).train.facts
    assert facts["num_classes"] == 3
    assert facts["largest_class_fraction"] == pytest.approx(80 / 200)
    assert facts["smallest_class_fraction"] == pytest.approx(60 / 200)


def jaccard(left: str, right: str) -> float:
    a, b = (set(zip(*(text.split()[i:] for i in range(SHINGLE_WORDS)), strict=False)) for text in (left, right))
    return len(a & b) / len(a | b)


def test_signatures_estimate_the_similarity_of_texts() -> None:
    texts = sentences(100, num_words=60)
    others = []
    for i, text in enumerate(texts):
        words = text.split()
        words[: i % 40] = sentences(1, max(1, i % 40), seed=100 + i)[0].split()
        others.append(" ".join(words))
    hasher = MinHasher(0.8)
    left, right = (hasher.sign(hash_runs(hash_words(some), SHINGLE_WORDS))[0] for some in (texts, others))
    errors = (left == right).mean(axis=1) - np.array([jaccard(a, b) for a, b in zip(texts, others, strict=True)])
    assert abs(errors).max() < 0.2
    assert abs(errors.mean()) < 0.02


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from(WORDS[:6]), max_size=9), max_size=12), st.integers(1, 5))
def test_runs_of_words_are_equal_if_and_only_if_the_words_are(texts: list[list[str]], length: int) -> None:
    runs = hash_runs(hash_words([" ".join(words) for words in texts]), length)
    seen: dict[tuple[str, ...], int] = {}
    for row, words in enumerate(texts):
        wanted = [tuple(words[i : i + length]) for i in range(max(1, len(words) - length + 1))] if words else []
        found = runs.values[runs.starts[row] : runs.starts[row + 1]].tolist()
        assert len(found) == len(wanted)
        for run, value in zip(wanted, found, strict=True):
            assert seen.setdefault(run, value) == value
    assert len(set(seen.values())) == len(seen)


def test_words_are_read_without_case_and_marks_and_han_by_character() -> None:
    words = hash_words(["Grüße, Welt!", "grüße welt", "我爱你", "我 爱 你", "", "!?"])
    lists = [words.values[a:b].tolist() for a, b in zip(words.starts, words.starts[1:], strict=False)]
    assert lists[0] == lists[1]
    assert lists[2] == lists[3]
    assert [len(one) for one in lists] == [2, 2, 3, 3, 0, 0]


pairs_of_rows = st.integers(1, 40).flatmap(
    lambda n: st.tuples(st.permutations(range(n)), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), max_size=40))
)


@settings(max_examples=30)
@given(pairs_of_rows)
def test_clusters_are_those_of_the_pairs_and_known_by_their_lowest_rank(
    case: tuple[list[int], list[tuple[int, int]]],
) -> None:
    rank, pairs = np.array(case[0]), case[1]
    clusters = Clusters(rank)
    for start in range(0, len(pairs), 7):
        some = np.array(pairs[start : start + 7])
        clusters.join(some[:, 0], some[:, 1])
    members = {row: {row} for row in range(len(rank))}
    for a, b in pairs:
        merged = members[a] | members[b]
        members |= dict.fromkeys(merged, merged)
    assert clusters.roots().tolist() == [min(members[row], key=lambda one: rank[one]) for row in range(len(rank))]


def test_without_a_split_every_row_is_test_whatever_resembles_it(tmp_path: Path) -> None:
    """Near duplicates, the same prompt with another answer, classes of one row: all that a split would set aside."""
    texts = sentences(8)
    rows = rows_of([*texts, *map(changed, texts)]) + rows_of(texts[:3], "no") + rows_of(["only one"], "never")
    source = jsonl(tmp_path / "rows.jsonl", [row | {"split": "train"} for row in rows])
    prepared = prepare(tmp_path, source, split_by="none")
    assert prepared.test.facts["num_rows"] == len(rows) == 20
    assert (prepared.train.facts["num_rows"], prepared.validation.facts["num_rows"]) == (0, 0)
    assert prompts(tmp_path, "test") == {row["prompt"] for row in rows}
    assert set_aside(tmp_path) == []
    report = (tmp_path / "out" / "report.html").read_text()
    assert "only one" in report or texts[0] in report, "it shows some of the rows"


def test_rows_are_counted_in_tokens_without_a_split_too(tiny_model: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", rows_of(sentences(12)))
    prepared = prepare(tmp_path, source, split_by="none", tokenizer_uri=str(tiny_model))
    assert prepared.test.facts["num_tokens"] > 12 * 30
    assert "num_tokens" not in prepared.train.facts
