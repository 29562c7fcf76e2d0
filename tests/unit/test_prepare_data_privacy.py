"""Secrets in every place of a data set: none of them may be in what prepare_data writes, logs or raises."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.errors import UserError
from slmops.prepare_data.config import PrepareDataConfig
from slmops.prepare_data.run import PreparedData, run

SECRETS = {
    "email": ["jane.roe@example.org", "max@müller.example"],
    "phone": ["+49 30 901820", "(415) 555-2671", "07911 123456"],
    "card": ["4111 1111 1111 1111", "378282246310005"],
    "iban": ["GB82 WEST 1234 5698 7654 32", "de89370400440532013000"],
    "ip": ["203.0.113.195", "2001:db8:85a3::8a2e:370:7334"],
}
ALL = [secret for secrets in SECRETS.values() for secret in secrets]
DISGUISED = [
    "ｊａｎｅ．ｒｏｅ＠ｅｘａｍｐｌｅ．ｏｒｇ",
    "4111\u200b1111\u00a01111\u20111111",
    "４１５－５５５－２６７１",
]

GOOD = [{"prompt": f"question {i} of a kind", "completion": f"label {i % 3}"} for i in range(40)]


def skeleton(text: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text))).lower()


class Watch:
    """Looks for the secrets in all that a run leaves behind."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.caplog, self.capfd = folder, caplog, capfd

    def prepare(self, source: Path, **settings: Any) -> PreparedData | str:
        """What the step gives, or its error; neither may hold a secret."""
        out = self.folder / "out"
        config = PrepareDataConfig.create({"source_uri": str(source), "max_bad_fraction": 0.5, **settings})
        result: PreparedData | str
        try:
            result = run(config, train=out / "train", validation=out / "validation", test=out / "test",
                         report=out / "report.html")  # fmt: skip
        except UserError as error:
            result = str(error)
        said = self.capfd.readouterr()
        left = {"log": self.caplog.text, "output": said.out + said.err, "result": str(result)}
        for path in self.folder.rglob("*"):
            if path.is_file() and path.parent != self.folder:
                left[str(path)] = path.read_text(encoding="utf-8")
        for where, text in left.items():
            found = [secret for secret in ALL if secret in text or skeleton(secret) in skeleton(text)]
            assert not found, f"{found} in {where}"
        return result


@pytest.fixture
def watch(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Iterator[Watch]:
    with caplog.at_level("DEBUG", logger="slmops"):
        yield Watch(tmp_path, caplog, capfd)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("pii", ["redact", "drop"])
def test_in_prompts_completions_labels_bad_rows_and_column_names(watch: Watch, tmp_path: Path, pii: str) -> None:
    rows: list[Any] = [{**row, "task": "chat", "who": f"c{i}"} for i, row in enumerate(GOOD)]
    for secret in [*ALL, *DISGUISED]:
        rows += [
            {"prompt": f"I am reached at {secret}, why?", "completion": "label 1"},
            {"prompt": f"say {secret}", "completion": f"{secret}"},
            {"prompt": f"question of {secret}", "completion": "label 2", "task": secret, "who": secret},
            {"prompt": "", "completion": f"only {secret}", secret: secret},
            {"prompt": {"nested": [secret]}, "completion": {secret: 1}},
            {"prompt": "x" * 1985 + f" {secret} " + "y" * 3000, "completion": ""},
            f'{{"prompt": "{secret}", broken',
            json.dumps([secret]),
            json.dumps(secret),
        ]
    prepared = watch.prepare(jsonl(tmp_path / "rows.jsonl", rows), pii=pii, group_by="who")
    assert isinstance(prepared, PreparedData), prepared
    facts = prepared.train.facts
    for kind, secrets in SECRETS.items():
        assert facts[f"num_pii_{kind}"] >= 3 * len(secrets), kind
    page = (tmp_path / "out" / "report.html").read_text()
    assert "[EMAIL]" in page
    assert "[CARD]" in page


def test_in_labels_that_strata_and_classes_are_named_by(watch: Watch, tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"question {i} of many", "completion": "yes", "owner": ALL[i % 3]} for i in range(60)]
    prepared = watch.prepare(jsonl(tmp_path / "rows.jsonl", rows), stratify_by="owner")
    assert isinstance(prepared, PreparedData), prepared


def test_in_chats_with_strange_roles_and_keys(watch: Watch, tmp_path: Path) -> None:
    def chat(*turns: dict[str, Any]) -> dict[str, Any]:
        return {"messages": list(turns)}

    rows: list[Any] = [chat({"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]})
                       for r in GOOD]  # fmt: skip
    for secret in ALL:
        rows += [
            chat({"role": secret, "content": "x"}, {"role": "assistant", "content": "y"}),
            chat({"role": "user", "content": "x", secret: secret}, {"role": "assistant", "content": "y"}),
            chat({"role": "system", "content": secret}, {"role": "user", "content": f"{secret}?"},
                 {"role": "assistant", "content": secret}),
            {"messages": secret},
            {"messages": [secret]},
        ]  # fmt: skip
    prepared = watch.prepare(jsonl(tmp_path / "rows.jsonl", rows))
    assert isinstance(prepared, PreparedData), prepared
    assert prepared.train.facts["num_bad"] == 4 * len(ALL)


LONG = "someone.with.a.long.name.and.more@a-company-with-a-long-name.example"


def test_where_what_is_shown_is_cut(watch: Watch, tmp_path: Path) -> None:
    """Half a value is not recognised, so none may be cut in half before it is looked for, and none shine through."""
    rows: list[Any] = list(GOOD)
    for secret, shift in ((long, shift) for long in [*ALL, LONG] for shift in range(0, len(long) + 4, 4)):
        rows += [
            {"prompt": "", "completion": "x" * (1990 - shift) + f" {secret} " + "y" * 300},
            {"prompt": "", "completion": f"{secret} " * 400 + "." * shift},
            {"prompt": "x", "completion": "y", "split": " " * shift + secret},
            {"prompt": "", "completion": f"first line\n{secret}\n{secret}", "list": [f"a\n{secret}"]},
        ]
    prepared = watch.prepare(jsonl(tmp_path / "rows.jsonl", rows), max_bad_fraction=0.9)
    assert isinstance(prepared, PreparedData), prepared
    assert isinstance(watch.prepare(tmp_path / "rows.jsonl", max_bad_fraction=0.9, split_by="column"), str)
    rows = [row | {"split": ("train", "test")[i % 2]} for i, row in enumerate(GOOD)] + rows[40:]
    prepared = watch.prepare(jsonl(tmp_path / "rows.jsonl", rows), max_bad_fraction=0.9, split_by="column")
    assert isinstance(prepared, PreparedData), prepared
    shown = (tmp_path / "out" / "train" / "bad_rows.jsonl").read_text() + (tmp_path / "out" / "report.html").read_text()
    for secret in [*ALL, LONG]:
        half = secret[: len(secret) // 2 + 2]
        assert half not in shown, f"half of {secret} is shown"


def test_in_numbers_of_rows_that_are_set_aside(watch: Watch, tmp_path: Path) -> None:
    rows: list[Any] = [
        *GOOD,
        {"prompt": "", "phone": 4155552671, "card": 4111111111111111, "at": {"deep": [4012888888881881]}},
    ]
    assert isinstance(watch.prepare(jsonl(tmp_path / "rows.jsonl", rows)), PreparedData)
    shown = (tmp_path / "out" / "train" / "bad_rows.jsonl").read_text()
    assert "[PHONE]" in shown
    assert shown.count("[CARD]") == 2


@pytest.mark.parametrize("secret", [secrets[0] for secrets in SECRETS.values()])
def test_in_files_without_a_header_and_in_errors(watch: Watch, tmp_path: Path, secret: str) -> None:
    source = tmp_path / "rows.csv"
    quoted = f'"{secret}"'
    source.write_text(f'{quoted},"I am {secret}"\n' + "a,b\n" * 20, encoding="utf-8")
    assert "has the columns" in str(watch.prepare(source))
    source.write_text(f"{quoted},{quoted}\n" + "a,b\n" * 20, encoding="utf-8")
    assert isinstance(watch.prepare(source), str)
    source.write_text(f"prompt,completion,{quoted}\n" + "".join(f"q{i},a{i % 2},{quoted}\n" for i in range(40)))
    assert isinstance(watch.prepare(source), PreparedData)
    source.write_text(f'prompt,completion\n{quoted},"{secret}\n' + "a,b\n" * 20)
    watch.prepare(source, max_bad_fraction=0.0)
    rows = [*GOOD, {"prompt": "x", "completion": [secret], "prompt ": secret}, f"{{{secret}"]
    assert "rows are bad" in str(watch.prepare(jsonl(tmp_path / "bad.jsonl", rows), max_bad_fraction=0.0))


def test_nothing_is_found_only_because_it_was_looked_for_wrongly(tmp_path: Path) -> None:
    assert all(re.search(r"\w", skeleton(secret)) for secret in ALL)
    assert skeleton(DISGUISED[0]) == skeleton(ALL[0])
