"""What surrounds a step: exit codes, the termination log, and retries of what may pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from pathlib import Path
import slmops.step
from slmops.errors import {error}

slmops.step.FIRST_PAUSE_S = 0.01
tries = Path(sys.argv[1])
with slmops.step.step("prepare_data"):
    number = len(tries.read_text()) if tries.exists() else 0
    tries.write_text("x" * (number + 1))
    if number < int(sys.argv[2]):
        raise {error}("the store does not answer")
print("done")
"""


def _run(
    tmp_path: Path, error: str, num_failures: int, retries: str | None
) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run a step that fails `num_failures` times; returns how it ended and how often it was tried."""
    script, tries = tmp_path / "step.py", tmp_path / "tries"
    script.write_text(CODE.format(error=error))
    environment = os.environ | {"SLMOPS_TERMINATION_LOG": str(tmp_path / "log")}
    if retries:
        environment["SLMOPS_TRANSIENT_RETRIES"] = retries
    command = [sys.executable, str(script), str(tries), str(num_failures)]
    return subprocess.run(command, capture_output=True, text=True, env=environment), len(tries.read_text())


def test_what_may_pass_is_tried_again(tmp_path: Path) -> None:
    ended, num_tries = _run(tmp_path, "StoreUnavailable", 2, "3")
    assert (ended.returncode, num_tries, ended.stdout) == (0, 3, "done\n")
    assert "trying again in 0 s (1 of 3)" in ended.stderr
    assert "trying again in 0 s (2 of 3)" in ended.stderr
    assert not (tmp_path / "log").exists()


def test_the_last_retry_ends_with_the_transient_code(tmp_path: Path) -> None:
    ended, num_tries = _run(tmp_path, "StoreUnavailable", 9, "2")
    assert (ended.returncode, num_tries) == (75, 3)
    assert (tmp_path / "log").read_text() == "prepare_data: the store does not answer\nexit code 75"


@pytest.mark.parametrize(("error", "code"), [("ConfigError", 2), ("GateError", 3)])
def test_what_a_user_must_fix_is_not_tried_again(tmp_path: Path, error: str, code: int) -> None:
    ended, num_tries = _run(tmp_path, error, 1, "3")
    assert (ended.returncode, num_tries) == (code, 1)


def test_without_the_setting_nothing_is_tried_again(tmp_path: Path) -> None:
    ended, num_tries = _run(tmp_path, "StoreUnavailable", 1, None)
    assert (ended.returncode, num_tries) == (75, 1)
