"""The data report: what it counts, and a page that people read, looked at in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.pages import charts
from slmops.prepare_data.findings import (
    Class,
    Cluster,
    Findings,
    Lengths,
    LengthTally,
    PersonalData,
    Sample,
    SetAside,
    Source,
    class_balance,
    funnel,
)
from slmops.prepare_data.report import render, write_report
from tests.unit.test_report import INJECTION, browser, contrast, look, requests_of, text_of  # noqa: F401

SOURCE = Source(
    "s3://lab/bank.jsonl", "etag-1", "ab" * 32, 1_140_000, "JSONL, layout columns", "its name ends in .jsonl",
    {"text": "prompt", "category": "completion"},
)  # fmt: skip


def tally(*lengths: int) -> LengthTally:
    counted = LengthTally()
    counted.add(lengths)
    return counted


def findings(**changes: Any) -> Findings:
    """Of a run with something in every section, some of it hostile."""
    rng = np.random.default_rng(0)
    lengths = LengthTally()
    lengths.add(rng.lognormal(4, 0.7, 10_000).astype(int))
    counts = {split: {f"class {i}": n // (i + 1) for i in range(9)} for split, n in (("train", 900), ("test", 90))}
    counts["train"]["seen once"] = 1
    shown: dict[str, Any] = {
        "name": "bank.jsonl",
        "source": SOURCE,
        "num_read": 10_197,
        "funnel": funnel(10_197, [("bad", 30, "in bad_rows.jsonl"), ("language", 90, ""), ("exact duplicates", 0, ""),
                                  ("near duplicates", 70, "one is kept"), ("leaked by prompt", 93, "")]),
        "splits": {"train": 8420, "validation": 498, "test": 996},
        "set_aside_reasons": {"language de": 90, "near duplicates": 70, "leaked": 93, INJECTION: 29, "not JSON": 1},
        "set_aside": (SetAside("bank.jsonl:7", "bad", INJECTION, INJECTION * 20),
                      SetAside("bank.jsonl:8", "language", "language de", "Wo?")),
        "pii_policy": "redact",
        "pii": (PersonalData("email", 211, 210), PersonalData("card", 60, 60)),
        "num_pii_rows": 250,
        "num_cleaned": 12,
        "num_clusters": 66,
        "clusters": (Cluster(3, f"Where is {INJECTION}", "Where\n\n\n is"),),
        "num_contradictions": 3,
        "class_column": "category",
        "num_classes": 10,
        "classes": class_balance(counts, 30),
        "lengths": (Lengths("prompts", "characters", lengths.histogram()),
                    Lengths("whole rows", "tokens", lengths.histogram(), limit=120)),
        "tokenizer": "SmolLM2 195f849e0f8e",
        "samples": (Sample("ab12", "train", (("user", INJECTION + " please" * 200), ("assistant", "card_arrival"))),),
        "settings": {"prompt_template": "{text}", "system_prompt": ""},
        "durations_s": {"read": 11.5, "select": 2.0, "write": 200.0},
    }  # fmt: skip
    return Findings(**{**shown, **changes})


@pytest.fixture(scope="module")
def page() -> str:
    return render(findings())


EMPTY = Findings("nothing", SOURCE, 0, (), {"train": 0, "validation": 0, "test": 0})


def test_it_says_what_became_of_every_row(page: str) -> None:
    words = text_of(page).replace("\u00a0", " ")
    assert "Rows in the splits 9,914 97.2 % of 10,197 read. 283 set aside." in words
    assert "Personal data 271 Values in 250 rows. Redacted." in words
    assert "Duplicates left out 70 0 exact, 70 near. 66 clusters" in words
    assert "Leaks left out 93" in words
    assert "bad 30 10,167 in bad_rows.jsonl language 90 10,077 exact duplicates – 10,077" in words
    assert "train 8,420 validation 498 test 996" in words
    assert "text prompt category completion" in words
    assert "e-mail addresses 211 210 2.1 % payment cards 60 60 0.6 % any kind 271 250 2.5 %" in words
    assert "not JSON 1 < 0.1 %" in words
    assert "12 rows lost control characters" in words
    assert "3 prompts occur with more than one completion" in words
    assert "read 11.5 s" in words
    assert "in all 3 min 34 s" in words


def test_a_class_that_a_split_lacks_is_pointed_out(page: str) -> None:
    words = text_of(page)
    assert "1 of the 10 classes shown is missing in train or test" in words
    assert "seen once not in test 1 1 0 0" in words


def test_lengths_are_drawn_with_their_quantiles(page: str) -> None:
    assert page.count('<svg class="chart"') == 2
    assert re.search(r'aria-label="prompts in characters: median \d+, mean \d+, 99 % up to \d+, longest \d+', page)
    assert "median 5" in text_of(page)
    assert "limit 120" in page


def test_what_rows_say_is_shown_and_not_run() -> None:
    hostile = Class(INJECTION, 5, 0, 1)
    page = render(findings(name=INJECTION, class_column=INJECTION, classes=(hostile,), num_classes=1, lengths=()))
    assert "<script" not in page
    assert "<img" not in page
    assert INJECTION in text_of(page)
    assert "default-src 'none'" in page, "and if it were markup, the page would run nothing"


def test_the_same_findings_give_the_same_small_page_that_loads_nothing(page: str) -> None:
    assert page == render(findings())
    assert len(page.encode()) < 150_000
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|url\((?!#)|@import", page)


def test_it_is_readable_where_there_is_nothing_to_show() -> None:
    words = text_of(render(EMPTY))
    assert "Nothing was read." in words
    assert "Every row is in a split." in words
    assert "None" not in words.replace("None was found", "").replace("None set aside", "")
    assert "nan" not in words.lower().split()


def test_it_appears_whole_and_takes_any_text(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(path, findings(samples=(Sample("ab", "train", (("user", "broken \udcff surrogate"),)),), lengths=()))
    assert "broken \\udcff surrogate" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**30), min_size=1, max_size=60))
def test_a_histogram_counts_every_length_once_and_knows_its_quantiles(lengths: list[int]) -> None:
    counted = LengthTally()
    for part in (lengths[:7], lengths[7:]):
        counted.add(part)
    found = counted.histogram()
    assert sum(found.counts) == found.num_values == len(lengths)
    assert (found.smallest, found.largest, found.total) == (min(lengths), max(lengths), sum(lengths))
    assert list(found.edges) == sorted(set(found.edges))
    assert len(found.counts) <= 42
    for share, value in found.quantiles.items():
        exact = np.quantile(lengths, share, method="inverted_cdf")
        assert exact * (1 - 1 / 64) <= value <= exact


def test_short_lengths_are_exact_and_long_ones_take_no_more_room() -> None:
    assert tally(5, 5, 9).histogram().quantiles[0.99] == 9
    many = LengthTally()
    for _ in range(3):
        many.add(np.random.default_rng(1).integers(0, 10**7, 200_000))
    assert len(many._bins) < 1300


def test_the_largest_classes_are_shown_and_those_that_a_split_lacks() -> None:
    counts = {"train": {"a": 90, "b": 50, "c": 2, "only here": 1}, "test": {"a": 10, "b": 5, "c": 1}}
    assert [one.name for one in class_balance(counts, 2)] == ["a", "b", "only here"]
    assert class_balance(counts, 9)[0] == Class("a", 90, 0, 10)
    assert class_balance({}, 9) == ()


def test_split_colors_can_be_told_from_the_page_in_both_themes() -> None:
    css = (Path(charts.__file__).parent / "page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in css.split("@media (prefers", 1))
    for theme in (light, dark):
        for mark in ("train", "held-out", "test"):
            assert contrast(theme[mark], theme["page"]) >= 2.4, mark


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_a_browser_shows_it_whole(browser: Any, page: str, tmp_path: Path, width: int, scheme: str) -> None:  # noqa: F811
    path = tmp_path / "data.html"
    path.write_text(page)
    look(browser, path, width, scheme)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert requests_of(browser) == {path.as_uri()}
    assert browser.title == "bank.jsonl – slmops data report", "no script of a row has run"
    overflow = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0, "the page itself never scrolls sideways"
    for chart in browser.find_elements("css selector", "svg"):
        assert chart.is_displayed()
        assert chart.size["width"] >= 300
        assert chart.size["height"] >= 100
    bars = browser.find_elements("css selector", ".splits i")
    assert [bar.size["width"] > 0 for bar in bars] == [True] * 3


def test_on_paper_no_table_is_cut_off(browser: Any, page: str, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "paper.html"
    path.write_text(page)
    look(browser, path, 720, "light", media="print")
    for region in browser.find_elements("css selector", ".scroll"):
        cut_off = browser.execute_script("return arguments[0].scrollWidth - arguments[0].clientWidth", region)
        assert cut_off <= 0, region.get_attribute("aria-label")
