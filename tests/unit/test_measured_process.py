"""What a measured process says is any bytes: none of them stops the measurement or hides why it ended."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.measuring.process import MAX_WORDS_BYTES, Died, Task, run_worker

TASK = Task(quantized=True, num_threads=1, max_new_tokens=1, prompts=[[{"role": "user", "content": "hello"}]])

Start = Callable[[str], dict[str, Any]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Run a program of Python's in the place of the worker."""

    def run(code: str) -> dict[str, Any]:
        program = tmp_path / "program"
        program.write_text(f"#!{sys.executable}\nimport os\n{code}")
        program.chmod(0o755)
        monkeypatch.setattr("slmops.measuring.process.sys.executable", str(program))
        return run_worker(tmp_path, TASK, None, None)

    return run


def test_lines_of_native_libraries_between_the_workers_own_are_passed_over(start: Start) -> None:
    lines = b'{0} CPUs\n\xff\xfe\n[1]\n12\n{"first_token_at": 1e12}\n{"done": 1}\n{"runtime": "x"}\n'
    assert start(f"os.write(1, {lines!r})")["runtime"] == "x"


def test_the_last_words_are_told_whatever_they_are_made_of(start: Start) -> None:
    with pytest.raises(Died, match="ended with code 3: no room for \ufffd"):
        start(r"os.write(2, b'loading\nno room for \xff\n'); os._exit(3)")


def test_the_last_words_are_few(start: Start) -> None:
    with pytest.raises(Died) as died:
        start("os.write(2, b'x' * 5000 + b'the end'); os._exit(1)")
    assert str(died.value).endswith("the end")
    assert len(str(died.value)) < MAX_WORDS_BYTES + 100


def test_a_process_that_ends_well_without_a_result_has_died(start: Start) -> None:
    with pytest.raises(Died, match="ended with code 0: no message"):
        start("os.write(1, b'hello\\n')")
