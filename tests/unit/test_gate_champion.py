"""The gate beside the champion: none yet, one that cannot be evaluated, and one that is better or worse."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.fetch_champion.config import FetchChampionConfig
from slmops.fetch_champion.run import run as fetch_champion
from slmops.gate.config import GateConfig
from slmops.gate.run import run
from slmops.verdicts import read_verdict
from tests.unit.test_gate import EVALUATION, digest, good_facts, write_measurement

ARCHITECTURE = "no variant of the release runs on the machine that evaluates: cpu-int4: needs aarch64"

Gate = Callable[..., Sidecar]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """Judges a good candidate, whose first 276 of 300 rows are right, beside the champion that `champion` evaluated."""
    with artifacts.writing(tmp_path / "test", kind="chat_dataset", step="prepare_data") as draft:
        (draft.path / "rows.jsonl").write_text("{}\n")
    facts = good_facts()
    for name, values in facts.items():
        kind: Any = name.partition("_")[2]
        write_measurement(tmp_path / name, kind, values, artifacts.read(tmp_path / "test"))

    def judge(champion: Path | None, **settings: Any) -> Sidecar:
        paths: dict[str, Any] = {name: tmp_path / name for name in facts}
        for name in ("candidate_evaluation", "candidate_benchmark"):
            paths[f"{name}s"] = [paths.pop(name)]
        return run(
            GateConfig(**settings),
            **paths,
            champion_evaluation=champion,
            verdict=tmp_path / "verdict",
            report=tmp_path / "report.html",
        )

    return judge


def champion(tmp_path: Path, accuracy: float) -> Path:
    """An evaluation on the same rows, of what a node would run."""
    about = {"status": "found", "channel": "lab", "released_as": "cpu-int8"}
    with artifacts.writing(tmp_path / "fetched", kind="variants", step="fetch_champion") as draft:
        (draft.path / "model.onnx").write_bytes(b"champion")
        draft.facts |= about | {"variants": {}, "release": {"digest": "c" * 64, "sequence": 4}}
    facts = EVALUATION | {"accuracy": accuracy, "variant": "champion", "model_digest": digest("champion")}
    facts |= {"status": "measured", "released_as": "cpu-int8", "channel": "lab"}
    write_measurement(tmp_path / "champion", "evaluation", facts, draft.sidecar)
    return tmp_path / "champion"


def without_model(tmp_path: Path, fetched: Sidecar) -> Path:
    facts = {"variant": "champion", "status": "not_run", "reason": fetched.facts["reason"]}
    write_measurement(tmp_path / "champion", "evaluation", facts, fetched)
    return tmp_path / "champion"


def cannot_run(tmp_path: Path) -> Path:
    with artifacts.writing(tmp_path / "fetched", kind="variants", step="fetch_champion") as draft:
        draft.facts |= {"status": "cannot_run", "channel": "lab", "reason": ARCHITECTURE, "variants": {}}
        draft.facts["release"] = {"digest": "c" * 64, "sequence": 4}
    return without_model(tmp_path, draft.sidecar)


def words(tmp_path: Path) -> str:
    page = re.sub(r"<(style|title)\b.*?</\1>|<[^>]*>", " ", (tmp_path / "report.html").read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", page)


def names(sidecar: Sidecar) -> list[str]:
    return [check["name"] for check in sidecar.facts["pairs"][0]["checks"]]


def test_a_channel_without_a_release_asks_for_nothing(gate: Gate, tmp_path: Path) -> None:
    config = FetchChampionConfig(store_uri=str(tmp_path / "store"))
    found = without_model(tmp_path, fetch_champion(config, champion=tmp_path / "fetched"))
    for required in (False, True):
        sidecar = gate(found, champion_required=required)
        assert sidecar.facts["verdict"] == "pass"
        assert "champion_regression" not in names(sidecar)
        assert sidecar.facts["reason"] == f"all {len(names(sidecar))} checks hold"
        assert "Champion: no release in this channel yet." in words(tmp_path)


def test_a_candidate_that_is_worse_than_the_champion_fails(gate: Gate, tmp_path: Path) -> None:
    sidecar = gate(champion(tmp_path, accuracy=0.98), max_regression=0.05)
    assert sidecar.facts["verdict"] == "fail"
    (failed,) = [check for check in sidecar.facts["pairs"][0]["checks"] if check["verdict"] != "pass"]
    assert (failed["name"], failed["verdict"], failed["threshold"]) == ("champion_regression", "fail", -0.05)
    assert failed["value"] < -0.06
    assert "against the champion" in sidecar.facts["reason"]
    shown = words(tmp_path)
    assert "Champion: cpu-int8 of release cccccccccccc, number 4 of channel lab." in shown
    assert "Teacher full_precision Student full_precision Champion cpu-int8 Candidate cpu-int4" in shown


def test_a_candidate_as_good_as_the_champion_passes(gate: Gate, tmp_path: Path) -> None:
    sidecar = gate(champion(tmp_path, accuracy=0.93))
    assert sidecar.facts["verdict"] == "pass"
    assert "champion_regression" in names(sidecar)
    assert sidecar.parents.count(artifacts.read(tmp_path / "champion").digest) == 1


def test_a_champion_on_other_rows_is_not_run(gate: Gate, tmp_path: Path) -> None:
    facts = {"num_rows": 200, "accuracy": 0.9, "match": "json", "variant": "champion", "status": "measured"}
    write_measurement(tmp_path / "champion", "evaluation", facts, artifacts.read(tmp_path / "test"))
    sidecar = gate(tmp_path / "champion")
    assert sidecar.facts["verdict"] == "not_run"
    assert "candidate and champion were not evaluated on the same rows" in sidecar.facts["reason"]


def test_a_champion_that_cannot_be_evaluated_is_not_passed_over_in_silence(
    gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "slmops")
    sidecar = gate(cannot_run(tmp_path))
    assert sidecar.facts["verdict"] == "pass"
    assert sidecar.facts["reason"].endswith(f"; not held against the champion: {ARCHITECTURE}")
    assert ARCHITECTURE in caplog.text
    assert read_verdict(tmp_path / "verdict")[0].reason == sidecar.facts["reason"]
    shown = words(tmp_path)
    assert f"Beside the champion ? not run – -0.100 {ARCHITECTURE}; it does not count" in shown
    assert "Champion: release cccccccccccc, number 4 of channel lab, was not evaluated" in shown


def test_a_required_champion_that_cannot_be_evaluated_lets_nothing_pass(gate: Gate, tmp_path: Path) -> None:
    sidecar = gate(cannot_run(tmp_path), champion_required=True)
    assert sidecar.facts["verdict"] == "not_run"
    assert f"the champion was not evaluated: {ARCHITECTURE} (champion_regression)" in sidecar.facts["reason"]
    assert "it does not count" not in words(tmp_path)


def test_a_candidate_that_is_the_champion_loses_nothing(gate: Gate, tmp_path: Path) -> None:
    sidecar = gate(champion(tmp_path, accuracy=0.92))
    (check,) = [c for c in sidecar.facts["pairs"][0]["checks"] if c["name"] == "champion_regression"]
    assert (check["value"], check["verdict"]) == (0.0, "pass")
