"""prepare_data on the forms that data come in, and on files that are broken in every usual way."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slmops.errors import ConfigError, DataError, StoreError
from slmops.prepare_data.readers import read_json
from slmops.prepare_data.sources import Source, stream_splits
from tests.prepared import all_records, jsonl, prepare, prompts, records, set_aside

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i % 4}"} for i in range(40)]
ALPACA = [
    {"instruction": f"Add the numbers, case {i}.", "input": f"{i} and {i}" if i % 2 else "", "output": f"{2 * i}"}
    for i in range(40)
]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"question {i}"}, {"from": "gpt", "value": f"answer {i % 4}"}]}
    for i in range(40)
]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_alpaca_in_a_json_array_is_recognised_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "alpaca.json"
    source.write_text(json.dumps(ALPACA, indent=2))
    with caplog.at_level("INFO", logger="slmops"):
        prepared = prepare(tmp_path, source)
    assert "is a JSON array, because its name ends in .json; layout alpaca, because the first row has" in caplog.text
    assert prepared.train.facts["layout"] == "alpaca"
    by_prompt = {record.prompt[0]["content"]: record.completion for record in all_records(tmp_path)}
    assert by_prompt["Add the numbers, case 3.\n\n3 and 3"] == "6"
    assert by_prompt["Add the numbers, case 4."] == "8"
    assert "layout alpaca" in (tmp_path / "out" / "report.html").read_text()


def test_sharegpt_is_recognised_under_both_names(tmp_path: Path) -> None:
    renamed = [{"messages": row["conversations"], "system": "Be brief."} for row in SHAREGPT]
    for rows in (SHAREGPT, renamed):
        prepared = prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", rows))
        assert prepared.train.facts["layout"] == "sharegpt"
        assert len(all_records(tmp_path)) == 40
        assert {record.messages[-2].role for record in all_records(tmp_path)} == {"user"}
    assert {record.messages[0].content for record in all_records(tmp_path)} == {"Be brief."}
    bad = [*SHAREGPT, {"conversations": [{"from": "tool", "value": "x"}, {"from": "gpt", "value": "y"}]}]
    with pytest.raises(DataError, match=r"rows.jsonl:41: conversations\[0\].from must be one of .* found 'tool'"):
        prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", bad))


def test_given_templates_win_over_a_layout_that_the_columns_look_like(tmp_path: Path) -> None:
    prepare(
        tmp_path, jsonl(tmp_path / "r.jsonl", ALPACA), prompt_template="<{instruction}>", completion_template="{output}"
    )
    assert all(record.prompt[0]["content"].startswith("<Add") for record in all_records(tmp_path))


def test_a_folder_that_datasets_saved_gives_splits_and_names_of_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["sports", "news"])}
    )
    rows = {"text": [f"text {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    parts = whole.train_test_split(test_size=10, seed=1)
    parts.save_to_disk(tmp_path / "saved")
    whole.save_to_disk(tmp_path / "whole")
    layout: dict[str, Any] = {"prompt_template": "{text}", "completion_template": "{label}"}

    prepared = prepare(tmp_path, tmp_path / "saved", split_by="column", **layout)
    assert prompts(tmp_path, "test") == set(parts["test"]["text"]), "test stays test"
    assert prepared.train.facts["format"] == "a DatasetDict that datasets saved"
    assert {record.completion for record in all_records(tmp_path)} == {"sports", "news"}
    prepared = prepare(tmp_path, tmp_path / "whole", **layout)
    assert prepared.train.facts["format"] == "a Dataset that datasets saved"
    assert len(all_records(tmp_path)) == 40


def test_a_folder_of_data_files_is_read_whole_and_knows_its_splits(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# A data set")
    jsonl(folder / "data" / "train-00000-of-00002.jsonl", ROWS[:15])
    jsonl(folder / "data" / "train-00001-of-00002.jsonl", ROWS[15:30])
    jsonl(folder / "data" / "dev.jsonl", ROWS[30:35])
    jsonl(folder / "data" / "test.jsonl", ROWS[35:])
    prepared = prepare(tmp_path, folder, split_by="column")
    assert [sidecar.facts["num_rows"] for sidecar in prepared] == [30, 5, 5]
    assert sum(sidecar.facts["num_rows"] for sidecar in prepare(tmp_path, folder)) == 40
    jsonl(folder / "data" / "test.jsonl", [*ROWS[35:], {"prompt": ""}])
    with pytest.raises(DataError, match=r"data/test.jsonl:6: column 'prompt' is empty"):
        prepare(tmp_path, folder)
    write_csv(folder / "data" / "more.csv", ROWS)
    with pytest.raises(DataError, match=r"files of several kinds \(4 .jsonl, 1 .csv\)"):
        prepare(tmp_path, folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file that ends in"):
        prepare(tmp_path, tmp_path / "empty")


def test_a_repository_is_streamed_by_datasets(tmp_path: Path) -> None:
    """The hub itself cannot be reached from here; `datasets` streams a folder by the same code."""
    pytest.importorskip("datasets")
    folder = tmp_path / "repository"
    folder.mkdir()
    jsonl(folder / "train.jsonl", ROWS[:30])
    jsonl(folder / "test.jsonl", ROWS[30:])
    parts = tuple(stream_splits(str(folder), uri="hf://datasets/team/bank", config=None, revision=None))
    source = Source(parts, "a datasets repository", "", "0" * 64)
    found = [(part, row.line, row.columns) for part, row in source.rows(28, "split")]
    assert [parts[part].name for part, _, _ in found[:3]] == ["hf://datasets/team/bank:train"] * 2 + [
        "hf://datasets/team/bank:test"
    ]
    assert found[0][1:] == (29, ROWS[28] | {"split": "train"})
    assert found[-1][1:] == (10, ROWS[-1] | {"split": "test"})
    with pytest.raises(DataError, match="hf://datasets/team/none: datasets cannot read it"):
        list(stream_splits(str(tmp_path / "none"), uri="hf://datasets/team/none", config=None, revision=None))


def test_a_hub_name_of_a_wrong_form_is_explained(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="a data set of a hub is hf://datasets/owner/name"):
        prepare(tmp_path, "hf://team/bank")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "x"}', r"r.json:1: expected '\['; a .json file must hold one array"),
        ('[{"prompt": "x"}\n {"prompt": "y"}]', r"r.json:2: expected ','"),
        ('[{"prompt": "x"},\n {"prompt": ]', "r.json:2: not JSON: .* at column 12 of the row that begins here"),
        ('[{"prompt": "x"},\n', "r.json:2: not JSON"),
    ],
)
def test_a_broken_json_array_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_json(tmp_path / "r.json"))


def test_json_rows_are_the_same_wherever_a_piece_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "r.json"
    rows: list[Any] = [{"a": "ä\n]},{", "n": 12.5e3}, 17, {"b": [1, {"c": None}]}, {}]
    source.write_text(" [\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
    for size in (1, 2, 7, 1000):
        monkeypatch.setattr("slmops.prepare_data.readers.PIECE_CHARS", size)
        found = list(read_json(source))
        assert [row.columns for row in found] == [rows[0], {}, rows[2], {}]
        assert [row.line for row in found] == [2, 3, 4, 5]
        assert found[1].problem == "expected a JSON object, found int"


def test_stray_control_characters_go_and_binary_rows_are_set_aside(tmp_path: Path) -> None:
    rows = [
        *ROWS,
        {"prompt": "be\x07ll\r\nand\tmore", "completion": "a\x00b"},
        {"prompt": "\x00\x01" * 40, "completion": "x"},
    ]
    for source in (jsonl(tmp_path / "rows.jsonl", rows), write_csv(tmp_path / "rows.csv", rows)):
        prepared = prepare(tmp_path, source)
        assert prepared.train.facts["num_cleaned"] == 1
        found = {record.prompt[0]["content"]: record.completion for record in all_records(tmp_path)}
        assert found["bell\nand\tmore"] == "ab"
        (aside,) = set_aside(tmp_path)
        assert (aside["stage"], aside["reason"]) == ("control characters", "control characters")
        line = 42 if source.suffix == ".jsonl" else 44
        assert aside["where"] == f"{source}:{line}", "CSV has a header, and a row of two lines before it"


def test_cells_of_a_megabyte_are_kept_or_set_aside_by_length(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "word " * 220_000, "completion": "long"}]
    source = write_csv(tmp_path / "rows.csv", rows)
    prepare(tmp_path, source)
    (aside,) = set_aside(tmp_path)
    assert (aside["stage"], aside["reason"]) == ("length", "too long")
    assert len(aside["text"]) <= 2000
    prepare(tmp_path, source, max_chars=2_000_000)
    assert max(len(record.prompt[0]["content"]) for record in all_records(tmp_path)) == 1_100_000


def test_a_row_in_another_encoding_is_bad_and_a_file_in_utf_16_is_named(tmp_path: Path) -> None:
    text = "prompt,completion\n" + "".join(f"q {i},a\n" for i in range(40))
    source = tmp_path / "rows.csv"
    source.write_bytes(text.encode() + "café,x\n".encode("latin-1") + "naïve,x\n".encode("cp1252") + "Å,x\n".encode())
    prepared = prepare(tmp_path, source, max_bad_fraction=0.1)
    assert prepared.train.facts["num_bad"] == 2
    assert {bad["reason"] for bad in set_aside(tmp_path, "bad_rows.jsonl")} == {"column 'prompt' is not UTF-8"}
    assert {bad["where"] for bad in set_aside(tmp_path, "bad_rows.jsonl")} == {f"{source}:{line}" for line in (42, 43)}
    assert "Å" in {record.prompt[0]["content"] for record in all_records(tmp_path)}
    for name in ("rows.csv", "rows.jsonl", "rows.json"):
        (tmp_path / name).write_bytes(text.encode("utf-16"))
        with pytest.raises(DataError, match=f"{name} is UTF-16; convert it to UTF-8, for instance with `iconv"):
            prepare(tmp_path, tmp_path / name)


def test_rows_with_the_same_id_are_told_apart_by_what_they_say(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", [row | {"id": 7} for row in ROWS]))
    assert prepared.train.facts["num_duplicates"] == 0
    assert len({record.id for record in all_records(tmp_path)}) == 40


def test_labels_seen_once_are_counted_and_stay_in_train(tmp_path: Path) -> None:
    rows = [*ROWS, *({"prompt": f"rare {i}", "completion": f"rare label {i}"} for i in range(5))]
    prepared = prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", rows))
    assert prepared.train.facts["num_seen_once"] == 5
    assert {f"rare {i}" for i in range(5)} <= prompts(tmp_path, "train")
    assert {record.completion for record in records(tmp_path, "test")} == {f"answer {i}" for i in range(4)}


def test_a_table_with_very_many_columns_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    source.write_text(",".join(map(str, range(1_000_000))) + "\n" + ",".join("1" * 1_000_000) + "\n")
    with pytest.raises(DataError, match=r"rows.csv:1: line is longer than"):
        prepare(tmp_path, source)
    source.write_text(",".join(map(str, range(20_000))) + "\n" + ",".join("1" * 20_000) + "\n")
    with pytest.raises(DataError, match="has 20,000 columns, more than 10,000; is it the right file"):
        prepare(tmp_path, source)
    wide = {str(number): 1 for number in range(20_000)}
    with pytest.raises(DataError, match=r"rows.jsonl:41: has 20,000 columns, more than 10,000"):
        prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", [*ROWS, wide]))
    few_hundred = {f"column {number}": "x" for number in range(300)}
    with pytest.raises(ConfigError, match=r"'column 19' and 280 more; correct the setting") as failure:
        prepare(tmp_path, jsonl(tmp_path / "rows.jsonl", [few_hundred]))
    assert len(str(failure.value)) < 1000


def test_a_broken_quote_is_named_with_the_line_where_its_row_begins(tmp_path: Path) -> None:
    source = tmp_path / "rows.csv"
    rest = "".join(f'"q {i}",a\n' for i in range(40))
    source.write_text('prompt,completion\nfine,a\n"broken,a\n' + rest)
    with pytest.raises(DataError, match=rf"{source}:3: not CSV: .* \(in line 4\)"):
        prepare(tmp_path, source)
    prepared = prepare(tmp_path, source, max_bad_fraction=0.1)
    assert prepared.train.facts["num_bad"] == 1, "what follows is read again"
    source.write_text('prompt,completion\nfine,a\n"broken,a\n' + "plain text\n" * 500_000)
    with pytest.raises(DataError, match=f"{source}:3: the row that begins here has a quote that is never closed, or"):
        prepare(tmp_path, source)


def test_no_personal_data_is_in_files_errors_or_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secrets = ["jane.roe@example.org", "+49 30 901820", "4111 1111 1111 1111", "GB82 WEST 1234 5698 7654 32"]
    told = f"I am {secrets[0]}, call {secrets[1]}, card {secrets[2]}, account {secrets[3]}."
    rows: list[dict[str, Any]] = [row | {"part": "train" if i < 30 else "test"} for i, row in enumerate(ROWS)]
    rows += [
        {"prompt": f"{told} Why?", "completion": told, "part": "train"},
        {"prompt": f"{told} Why?", "completion": told, "part": "train"},
        {"prompt": told, "completion": "x", "part": secrets[0]},
        {"prompt": told, "completion": "", "part": "train"},
        {"prompt": "", "completion": told, secrets[0]: secrets[1], "part": "train"},
    ]
    source = jsonl(tmp_path / "rows.jsonl", rows)
    settings: dict[str, Any] = {"split_by": "column", "split_column": "part", "max_bad_fraction": 0.2}

    def check(*more: str) -> None:
        out = tmp_path / "out"
        written = [path.read_text() for path in out.rglob("*") if path.is_file()] if out.exists() else []
        for secret in secrets:
            assert not any(secret in text for text in [*written, caplog.text, *more])

    with caplog.at_level("INFO", logger="slmops"):
        prepared = prepare(tmp_path, source, **settings)
        check()
        assert prepared.train.facts["num_bad"] == 3
        assert prepared.train.facts["num_pii_email"] == 4
        assert prepared.train.facts["num_pii_rows"] == 2
        assert prepare(tmp_path, source, pii="drop", **settings).train.facts["num_pii_rows"] == 2
        check()
        assert set_aside(tmp_path)[0]["reason"] == "personal data: card, email, iban, phone"
        with pytest.raises(DataError) as failure:
            prepare(tmp_path, source, **settings | {"max_bad_fraction": 0.0})
        check(str(failure.value))
        (tmp_path / "headless.csv").write_text(f"{secrets[0]},{secrets[1]}\n" + "a,b\n" * 20)
        with pytest.raises(ConfigError, match="has the columns") as refused:
            prepare(tmp_path, tmp_path / "headless.csv")
        check(str(refused.value))
    prepare(tmp_path, source, pii="off", **settings)
    aside = json.dumps(set_aside(tmp_path)) + json.dumps(set_aside(tmp_path, "bad_rows.jsonl"))
    assert not any(secret in aside for secret in secrets), "also where they may stay in the data"
    assert any(secrets[0] in record.completion for record in all_records(tmp_path))


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i % 4}"} for i in range(400)]
    rows[50:50] = [{"prompt": "", "completion": "bad"}, rows[3]]
    source = jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"source_uri": str(source), "max_bad_fraction": 0.1, "max_chars": 1000}
    killed = f"""
import os, signal
from pathlib import Path
from slmops.prepare_data import intake, readers, run
from slmops.prepare_data.config import PrepareDataConfig
intake.CHUNK_ROWS = 50
parse = readers._parse
def parse_or_die(number, line):
    if number == 230:
        os.kill(os.getpid(), signal.SIGKILL)
    return parse(number, line)
readers._parse = parse_or_die
out = Path({str(tmp_path / "out")!r})
run.run(PrepareDataConfig.create({settings!r}), train=out / "train", validation=out / "validation", test=out / "test",
        report=out / "report.html")
"""
    done = subprocess.run([sys.executable, "-c", killed], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    with caplog.at_level("INFO", logger="slmops"):
        resumed = prepare(tmp_path, **_settings(settings))
    assert "going on behind row 201 of an unfinished run" in caplog.text
    fresh = prepare(tmp_path / "fresh", **_settings(settings))
    assert [sidecar.digest for sidecar in resumed] == [sidecar.digest for sidecar in fresh]
    assert resumed.train.facts == fresh.train.facts
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "validation", "test", "report.html"}


def _settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {"source": settings["source_uri"]} | {
        name: value for name, value in settings.items() if name != "source_uri"
    }
