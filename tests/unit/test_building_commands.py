"""The demo's data set: unambiguous, without leaks, the same everywhere, and English that a person would say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from slmops.demo import building_commands, building_phrases
from slmops.errors import ConfigError

WRONG_ENGLISH = (
    *("{", "}", "  ", "blinds is", "shades is", "blinds needs", " 1 degrees", " a espresso", "in the patio"),
    *("in the terrace", "turn on it", "switch off them", "seting", "puting", "makeing", "closeing"),
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return building_commands.make_rows()


def test_shares_of_splits_and_kinds(rows: list[dict[str, Any]]) -> None:
    assert Counter(row["split"] for row in rows) == {"train": 4980, "validation": 300, "test": 720}
    for split in ("train", "validation", "test"):
        kinds = Counter(row["kind"] for row in rows if row["split"] == split)
        assert set(kinds) == set(building_commands.KINDS)
    assert [row["split"] for row in rows[:50]] != ["train"] * 50, "rows come in a shuffled order"


@pytest.mark.parametrize("num_rows", [100, 257, 6000])
def test_as_many_rows_as_asked_for_and_none_twice(num_rows: int) -> None:
    rows = building_commands.make_rows(num_rows, seed=3)
    assert len(rows) == num_rows
    assert len({row["request"].lower().rstrip(".!?") for row in rows}) == num_rows


def test_more_rows_than_the_grammar_makes_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no more different requests of kind .*; set num_rows lower"):
        building_commands.make_rows(100_000)


def test_commands_are_canonical_and_sensible(rows: list[dict[str, Any]]) -> None:
    known = {(intent.device, intent.action): intent for intent in building_commands.INTENTS}
    for row in rows:
        command = json.loads(row["command"])
        assert row["command"] == json.dumps(command, separators=(",", ":"))
        assert list(command) == ["device", "room", "action", "value"]
        if row["kind"] == "out_of_scope":
            assert row["command"] == building_commands.NO_COMMAND
            continue
        assert (command["device"], command["action"]) in known
        assert command["room"] in building_commands.PLACES[command["device"]]


def test_a_request_has_one_meaning(rows: list[dict[str, Any]]) -> None:
    meanings = defaultdict(set)
    for seed in range(3):
        for row in building_commands.make_rows(3000, seed=seed):
            meanings[row["request"].lower().rstrip(".!?")].add(row["command"])
    contradicting = {request: commands for request, commands in meanings.items() if len(commands) > 1}
    assert not contradicting


def test_test_sentences_are_built_from_patterns_that_training_never_saw() -> None:
    train, test = building_commands.patterns("train"), building_commands.patterns("test")
    assert not train & test
    assert building_commands.patterns("validation") == train
    sides: list[set[str]] = [set(), set()]
    for table in (building_phrases.FRAMES, building_phrases.CORRECTIONS):
        for frames in table.values():
            for side in (0, 1):
                sides[side] |= set(frames[side])
    for side in (0, 1):
        sides[side] |= set(building_phrases.OUT_OF_SCOPE[side])
    assert not sides[0] & sides[1], "no frame on both sides"
    assert len(sides[0]) >= 80
    assert len(sides[1]) >= 25


def test_a_verb_phrase_of_an_intent_is_on_one_side_only() -> None:
    for intent, (train, test) in building_commands.INTENTS.items():
        assert not set(train) & set(test), intent
        assert train, intent
        assert test, intent


def test_every_device_room_and_action_is_trained_and_tested(rows: list[dict[str, Any]]) -> None:
    commands = {
        split: [json.loads(row["command"]) for row in rows if row["split"] == split] for split in ("train", "test")
    }
    for split in commands:
        assert {command["device"] for command in commands[split]} == {*building_phrases.DEVICES, None}
        assert {command["room"] for command in commands[split]} == {*building_phrases.ROOMS, None}
    pairs = {split: {(c["device"], c["action"]) for c in commands[split]} for split in commands}
    assert pairs["test"] <= pairs["train"]
    assert len({action for _, action in pairs["test"]}) >= 12


def test_slots_are_filled_and_the_english_is_right(rows: list[dict[str, Any]]) -> None:
    text = "\n".join(row["request"].lower() for row in rows if row["kind"] != "typo")
    for wrong in WRONG_ENGLISH:
        assert wrong not in text
    words = [len(row["request"].split()) for row in rows]
    assert sum(words) / len(words) < 16


def test_the_last_word_counts_in_a_correction(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["kind"] == "correction" and " no sorry, the " in row["request"]:
            said = row["request"].rsplit(" no sorry, the ", 1)[1].rstrip(".!?")
            assert said in building_phrases.ROOMS[json.loads(row["command"])["room"]]


def test_the_same_rows_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from slmops.demo.building_commands import write; write(pathlib.Path(sys.argv[1]), 300, 5)"
    )
    for name in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": name}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, env=environment)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"], "nothing half-written is left"
    written = [json.loads(line) for line in (tmp_path / "1").read_text().splitlines()]
    assert written == building_commands.make_rows(300, seed=5)
    assert written != building_commands.make_rows(300, seed=6)
