"""prepare_data on real files: what comes out, what is set aside, and what it says when it cannot go on."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slmops import artifacts
from slmops.errors import ArtifactError, ConfigError, DataError, StoreError, UserError
from slmops.prepare_data.chats import Template
from slmops.prepare_data.config import PrepareDataConfig
from slmops.prepare_data.intake import BAD_ROWS
from slmops.prepare_data.readers import read_csv, read_jsonl
from slmops.prepare_data.run import PreparedData, run
from slmops.prepare_data.splitting import SPLITS, Split, leaked_prompts, split_by_seed
from slmops.records import ROWS, ChatRecord, read_records
from slmops.storage import open_store

BANKING77 = Path(__file__).parents[3] / "shared" / "data" / "banking77" / "train.csv"

ROWS_100 = [{"prompt": f"question {i}", "completion": f"answer {i % 4}"} for i in range(100)]


def prepare(tmp_path: Path, source: Path | str, **settings: Any) -> PreparedData:
    config = PrepareDataConfig.create({"source_uri": str(source), **settings})
    paths = {split: tmp_path / "out" / split for split in SPLITS}
    return run(config, **paths, report=tmp_path / "out" / "report.html")


def records(tmp_path: Path, split: str) -> list[ChatRecord]:
    return read_records(tmp_path / "out" / split)


def all_records(tmp_path: Path) -> list[ChatRecord]:
    return [record for split in SPLITS for record in records(tmp_path, split)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, str]], encoding: str = "utf-8") -> Path:
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table  # type: ignore[import-untyped]

    write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.slow
def test_rows_come_from_s3_as_from_a_folder(bucket: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", ROWS_100)
    open_store(bucket).create("raw/rows.jsonl", file)
    far = prepare(tmp_path / "far", f"{bucket}/raw/rows.jsonl")
    near = prepare(tmp_path / "near", file)
    assert [sidecar.digest for sidecar in far] == [sidecar.digest for sidecar in near]
    assert {path.name for path in (tmp_path / "far" / "out").iterdir()} == {*SPLITS, "report.html"}
    with pytest.raises(StoreError, match=r"raw/absent\.jsonl does not exist; check bucket and key"):
        prepare(tmp_path / "absent", f"{bucket}/raw/absent.jsonl")


def test_every_row_lands_in_one_split_in_its_share(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", ROWS_100))
    assert [sidecar.facts["num_rows"] for sidecar in prepared] == [85, 5, 10]
    assert {record.prompt[0]["content"] for record in all_records(tmp_path)} == {row["prompt"] for row in ROWS_100}
    for split in SPLITS:
        sidecar = artifacts.expect(tmp_path / "out" / split, "chat_dataset")
        assert sidecar.step == "prepare_data"
        assert sidecar.facts["split"] == split
        assert sidecar.facts["layout"] == "columns"
        assert sidecar.facts["num_bad"] == sidecar.facts["num_duplicates"] == 0
    by_stratum = Counter(record.stratum for record in records(tmp_path, "test"))
    assert set(by_stratum) == {f"answer {i}" for i in range(4)}
    assert set(by_stratum.values()) <= {2, 3}


def test_the_three_formats_give_the_same_records(tmp_path: Path) -> None:
    rows = [{"prompt": f'Ünïcode "{i}",\nsecond line', "completion": f"{i % 3}, ok"} for i in range(30)]
    sources = [
        jsonl(tmp_path / "rows.jsonl", rows),
        write_csv(tmp_path / "rows.csv", rows),
        write_csv(tmp_path / "bom.csv", rows, encoding="utf-8-sig"),
        parquet(tmp_path / "rows.parquet", rows),
    ]
    bom = tmp_path / "bom.jsonl"
    bom.write_bytes(b"\xef\xbb\xbf" + sources[0].read_bytes())
    digests = {tuple(sidecar.digest for sidecar in prepare(tmp_path, source)) for source in [*sources, bom]}
    assert len(digests) == 1


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_rows(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS_100)
    first = prepare(tmp_path, source)
    mixed = list(ROWS_100)
    random.Random(1).shuffle(mixed)
    assert [s.digest for s in prepare(tmp_path, jsonl(tmp_path / "mixed.jsonl", mixed))] == [s.digest for s in first]
    other = prepare(tmp_path, source, seed=1)
    assert all(a.digest != b.digest for a, b in zip(first, other, strict=True))
    order = [record.prompt[0]["content"] for record in records(tmp_path, "train")]
    assert order != sorted(order, key=lambda text: int(text.split()[1])), "train is shuffled"


def test_chats_keep_their_turns_and_get_a_system_prompt(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    own = {"role": "system", "content": "Be rude."}
    rows: list[Any] = [
        {"messages": [*turns, {"role": "user", "content": f"n {i}"}, {"role": "assistant", "content": "ok"}]}
        for i in range(19)
    ]
    rows.append({"messages": [own, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What?"}]})
    for source in (jsonl(tmp_path / "chats.jsonl", rows), parquet(tmp_path / "chats.parquet", rows)):
        prepared = prepare(tmp_path, source, system_prompt="Be brief.")
        assert prepared.train.facts["layout"] == "messages"
        found = all_records(tmp_path)
        assert Counter(record.prompt[0]["content"] for record in found) == {"Be brief.": 19, "Be rude.": 1}
        assert {len(record.messages) for record in found} == {3, 5}


def test_templates_join_columns_and_keep_literal_braces(tmp_path: Path) -> None:
    rows = [{"Pro duct": f"p{i}", "price": i + 0.5, "tags": ["a", "b"]} for i in range(20)]
    prepare(
        tmp_path,
        jsonl(tmp_path / "rows.jsonl", rows),
        prompt_template="Price of {Pro duct}? {{json}}",
        completion_template='{{"price":{price},"tags":{tags}}}',
        stratify_by="none",
    )
    by_prompt = {record.prompt[0]["content"]: record.completion for record in all_records(tmp_path)}
    assert by_prompt["Price of p7? {json}"] == '{"price":7.5,"tags":["a", "b"]}'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{promt}", "names column 'promt', but .* has the columns 'prompt', 'completion'"),
        ("{prompt.__class__}", "names column 'prompt.__class__'"),
        ("{prompt[0]}", r"names column 'prompt\[0\]'"),
        ("{prompt!r}", "a column's name and nothing else"),
        ("{prompt:>9}", "a column's name and nothing else"),
        ("{}", "a column's name and nothing else"),
        ("{prompt", "prompt_template: .* write {{ and }} for braces"),
        ("}", "prompt_template: .* write {{ and }} for braces"),
        ("no column", "names no column"),
    ],
)
def test_a_wrong_template_is_explained(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", ROWS_100), prompt_template=template)
    assert not (tmp_path / "out" / "train").exists()


def test_all_settings_that_name_absent_columns_are_named_together(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS_100)
    with pytest.raises(
        ConfigError, match=r"prompt_template names column 'a'; split_column names column 'split'; strat"
    ):
        prepare(tmp_path, source, prompt_template="{a}", split_by="column", stratify_by="b")


def test_bad_rows_are_set_aside_with_line_and_reason(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS_100)
    lines = source.read_bytes().splitlines(keepends=True)
    lines[10:10] = [
        b"{broken\n",
        b"\n",
        b"[1]\n",
        b'{"prompt": "  ", "completion": "x"}\n',
        b'{"prompt": "no completion"}\n',
        b'{"prompt": "\xff", "completion": "x"}\n',
        b'{"prompt": "\\ud800", "completion": "x"}\n',
        b'{"prompt": null, "completion": "x"}\n',
        b"[" * 100_000 + b"\n",
    ]
    source.write_bytes(b"".join(lines))
    prepared = prepare(tmp_path, source, max_bad_fraction=0.2)
    assert prepared.train.facts["num_bad"] == 8
    assert sum(sidecar.facts["num_rows"] for sidecar in prepared) == 100
    bad = [json.loads(line) for line in (tmp_path / "out" / "train" / BAD_ROWS).read_text().splitlines()]
    reasons = {row["where"].rsplit(":", 1)[1]: row["reason"] for row in bad}
    assert reasons["11"].startswith("not JSON")
    assert reasons["13"] == "expected a JSON object, found list"
    assert reasons["14"] == reasons["18"] == "column 'prompt' is empty"
    assert reasons["15"] == "no column 'completion'"
    assert "UTF-8" in reasons["16"]
    assert reasons["17"] == "column 'prompt' is not UTF-8"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "rows.jsonl:15" in page


def test_too_many_bad_rows_stop_the_step_and_leave_nothing(tmp_path: Path) -> None:
    rows = [*ROWS_100[:20], *({"prompt": f"x{i}", "completion": ""} for i in range(7))]
    source = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as failure:
        prepare(tmp_path, source)
    message = str(failure.value)
    assert "7 of 27 rows are bad (25.93%), more than max_bad_fraction=0.001 allows" in message
    assert f"{source}:21: column 'completion' is empty" in message
    assert "and 2 more" in message
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "must be a list, found str"),
        ([], "must have a user's turn and end with the assistant's"),
        ([{"role": "assistant", "content": "x"}], "must have a user's turn"),
        ([{"role": "user", "content": "x"}], "end with the assistant's"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\].role must be system, user or assistant, found 'robot'"),
        ([{"role": "user", "content": ""}], r"messages\[0\].content is empty"),
        (["hi"], r"messages\[0\] must be an object, found str"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], r"messages\[0\] has tool_calls"),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "system", "content": "x"},
                {"role": "assistant", "content": "x"},
            ],
            "system message must be the first",
        ),
    ],
)
def test_a_chat_that_is_none_is_a_bad_row(tmp_path: Path, messages: Any, reason: str) -> None:
    good = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}]} for i in range(10)
    ]
    with pytest.raises(DataError, match=f"rows.jsonl:11: .*{reason}"):
        prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", [*good, {"messages": messages}]))


def test_csv_lines_are_counted_where_a_row_begins(tmp_path: Path) -> None:
    good = 'prompt,completion\n"two\nlines",a\n'
    source = tmp_path / "rows.csv"
    source.write_text(good + "only one field\n\n" + '"x"y,b\n' + "".join(f"q{i},a\n" for i in range(20)))
    with pytest.raises(DataError) as failure:
        prepare(tmp_path, source)
    assert f"{source}:4: 1 fields where the header has 2" in str(failure.value)
    assert f"{source}:6: not CSV" in str(failure.value)
    assert "2 of 23 rows" in str(failure.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt,completion\na,b\n"never closed,b\n' + "x,y\n" * 50, "rows.csv:3: .* a quote that is never closed"),
        ("prompt,prompt\na,b\n", r"names \['prompt'\] more than once"),
        ("", "has no rows"),
        ("prompt,completion\n", "has no rows"),
        ("prompt,completion\n" + "x" * 5_000_000, "rows.csv:2: line is longer than"),
    ],
)
def test_an_unusable_csv_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    source = tmp_path / "rows.csv"
    source.write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, source)


def test_duplicates_go_and_contradictions_stay_unless_they_leak(tmp_path: Path) -> None:
    rows = [*ROWS_100, *ROWS_100[:7], {"prompt": "question 0", "completion": "another answer"}]
    prepared = prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", rows), stratify_by="none")
    facts = prepared.train.facts
    assert facts["num_duplicates"] == 7
    assert facts["num_contradictions"] == 1
    assert sum(sidecar.facts["num_rows"] for sidecar in prepared) == 101 - facts["num_leaked"]


def test_a_prompt_of_test_leaves_train(tmp_path: Path) -> None:
    rows = [row | {"split": "train" if i < 80 else "test"} for i, row in enumerate(ROWS_100)]
    rows += [{"prompt": f"question {i}", "completion": "leaked", "split": "train"} for i in range(90, 95)]
    rows += [rows[99] | {"split": "train"}]
    prepared = prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", rows), split_by="column")
    assert prepared.test.facts["num_rows"] == 20, "test keeps all its rows"
    assert prepared.train.facts["num_leaked"] == 6
    assert prepared.validation.facts["num_rows"] == 4, "validation_fraction of the 86 rows of train"
    prompts = {split: {r.prompt[0]["content"] for r in records(tmp_path, split)} for split in SPLITS}
    assert not prompts["test"] & (prompts["train"] | prompts["validation"])
    assert not prompts["train"] & prompts["validation"]


def test_a_split_column_is_followed_and_checked(tmp_path: Path) -> None:
    marks = ["train"] * 12 + ["validation"] * 3 + ["test"] * 5
    rows = [row | {"part": mark} for row, mark in zip(ROWS_100, marks, strict=False)]
    column = {"split_by": "column", "split_column": "part"}
    prepared = prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", rows), **column)
    assert [sidecar.facts["num_rows"] for sidecar in prepared] == [12, 3, 5]
    with pytest.raises(DataError, match=r"rows.jsonl:3: column 'part' must be train, validation or test, found 'dev'"):
        prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", [*rows[:2], rows[2] | {"part": "dev"}, *rows[3:]]), **column)
    with pytest.raises(DataError, match=r"column 'part' .* names no row test"):
        prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", rows[:15]), **column)


def test_limits_on_the_number_of_rows(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS_100)
    with pytest.raises(DataError, match="more than max_rows=99 rows; raise it"):
        prepare(tmp_path, source, max_rows=99)
    assert sum(s.facts["num_rows"] for s in prepare(tmp_path, source, max_rows=100)) == 100
    with pytest.raises(DataError, match=r"9 usable rows \(12 rows, 0 bad, 3 duplicates\); at least 10"):
        prepare(tmp_path, jsonl(tmp_path / "few.jsonl", [*ROWS_100[:9], *ROWS_100[:3]]))
    ten = prepare(tmp_path, jsonl(tmp_path / "ten.jsonl", ROWS_100[:10]))
    assert [sidecar.facts["num_rows"] for sidecar in ten] == [8, 1, 1], "no split is empty"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("rows.xlsx", ConfigError, "must end in .jsonl, .json, .csv, .parquet"),
        ("rows.json", DataError, "has no rows"),
        ("absent.csv", UserError, "absent.csv"),
        ("folder.csv", UserError, "folder.csv"),
        ("broken.parquet", DataError, "cannot be read as Parquet"),
    ],
)
def test_a_source_that_is_no_data_is_explained(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(error, match=message):
        prepare(tmp_path, tmp_path / name)


def test_nothing_is_written_if_one_output_cannot_be(tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "test"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("important")
    with pytest.raises(ArtifactError, match="is not an artifact of slmops"):
        prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", ROWS_100))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test"]
    assert (foreign / "thesis.txt").read_text() == "important"


def test_the_report_shows_the_figures_and_escapes_the_texts(tmp_path: Path) -> None:
    rows = [{"prompt": f"<script>alert({i})</script>", "completion": f"c{i % 2}"} for i in range(40)]
    prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", rows))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page, "self-contained"
    assert "https://" not in page, "self-contained"
    assert re.search(r">train<[^0-9]{1,80}>34<", page)


@pytest.mark.skipif(not BANKING77.is_file(), reason="the public data set banking77 does not lie beside the checkout")
def test_banking77(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, BANKING77, prompt_template="{text}", completion_template="{category}")
    facts = prepared.train.facts
    with open(BANKING77, newline="") as file:
        num_rows = sum(1 for _ in csv.DictReader(file))
    kept = sum(sidecar.facts["num_rows"] for sidecar in prepared)
    assert facts["num_bad"] == 0
    assert kept == num_rows - facts["num_duplicates"] - facts["num_leaked"]
    assert {record.completion for record in records(tmp_path, "test")} == {
        record.completion for record in records(tmp_path, "train")
    }


@given(
    strata=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    validation=st.floats(0.01, 0.45),
    test=st.floats(0.01, 0.45),
    seed=st.integers(0, 5),
)
def test_each_stratum_and_the_whole_are_split_exactly(
    strata: list[int], validation: float, test: float, seed: int
) -> None:
    stratum = np.repeat(np.arange(len(strata)), strata).astype(np.uint64)
    rows = np.arange(len(stratum))
    shares: dict[Split, float] = {"validation": validation, "test": test, "train": 1 - validation - test}
    assume(all(len(rows) * share >= 2 for share in shares.values()))
    codes = split_by_seed(rows.astype(np.uint64), stratum, rows, shares, seed)
    for code, split in enumerate(SPLITS):
        share = shares[split]
        assert abs((codes == code).sum() - len(rows) * share) < 2
        for s, count in enumerate(strata):
            assert abs((codes[stratum == s] == code).sum() - count * share) < 1 + 1e-6


@pytest.mark.parametrize("order", [[0, 1, 3, 2, 4, 5, 6], [4, 6, 5, 0, 2, 1, 3]])
def test_no_split_is_empty_where_the_largest_is_one_unit(order: list[int]) -> None:
    ids = np.array(order, np.uint64)
    units = np.array([0, 1, 1, 3, 3, 3, 3])
    shares: dict[Split, float] = {"validation": 0.15, "test": 0.2, "train": 0.65}
    codes = split_by_seed(ids, (ids % 2).astype(np.uint64), units, shares, seed=0)
    assert set(codes.tolist()) == {0, 1, 2}


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=3, max_size=60),
    num_strata=st.integers(1, 5),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_splits_are_disjoint_complete_whole_by_group_and_stable_under_row_order(
    sizes: list[int], num_strata: int, seed: int, data: st.DataObject
) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    num_rows = len(groups)
    ids = np.array(data.draw(st.permutations(range(num_rows))), np.uint64)
    strata = (ids % num_strata).astype(np.uint64)
    shares: dict[Split, float] = {"validation": 0.15, "test": 0.2, "train": 0.65}

    def split(order: np.ndarray) -> dict[int, int]:
        first = np.array([np.flatnonzero(groups[order] == group)[0] for group in groups[order]])
        codes = split_by_seed(ids[order], strata[order], first, shares, seed)
        return dict(zip(ids[order].tolist(), codes.tolist(), strict=True))

    found = split(np.arange(num_rows))
    assert set(found) == set(ids.tolist())
    assert set(found.values()) == {0, 1, 2}, "each row is in one split, and no split is empty"
    assert split(np.array(data.draw(st.permutations(range(num_rows))))) == found
    for group in range(len(sizes)):
        assert len({found[int(i)] for i in ids[groups == group]}) == 1
    for code, name in enumerate(SPLITS):
        count = sum(value == code for value in found.values())
        assert abs(count - shares[name] * num_rows) <= max(sizes) + 1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 8)), max_size=60))
def test_after_the_leaks_no_two_splits_share_a_prompt(rows: list[tuple[int, int]]) -> None:
    codes = np.array([code for code, _ in rows], np.int8)
    prompts = np.array([prompt for _, prompt in rows], np.uint64)
    kept = ~leaked_prompts(prompts, codes)
    train, validation, test = (set(prompts[kept & (codes == code)]) for code in range(3))
    assert kept[codes == SPLITS.index("test")].all()
    assert not train & (validation | test)
    assert not validation & test


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_any_text_survives_csv_and_jsonl(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("round")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    assert [row.columns for row in read_jsonl(jsonl(folder / "r.jsonl", rows))] == rows
    path = folder / "r.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    assert [row.columns for row in read_csv(path)] == rows


@given(texts)
def test_a_template_inserts_values_as_they_are(value: str) -> None:
    assert Template("prompt_template", "<{a}>{{a}}").fill([value]) == f"<{value}>{{a}}"


def test_rows_file_is_named_as_every_step_expects(tmp_path: Path) -> None:
    prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", ROWS_100))
    assert {path.name for path in (tmp_path / "out" / "test").iterdir()} == {ROWS, artifacts.SIDECAR}
