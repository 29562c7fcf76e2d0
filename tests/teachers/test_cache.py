"""What a cache promises to those who pay for answers: none is lost, none is asked twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from slmops.errors import DiskFullError
from slmops.teachers.cache import AnswerCache
from slmops.teachers.interface import Answer, Decoding, question_key

IDENTITY = {"kind": "endpoint", "url": "http://localhost:8000/v1", "model": "big"}
GREEDY = Decoding(max_new_tokens=64)
RECORD = np.dtype([("ids", "<i4", (4,)), ("log_probs", "<f2", (4,)), ("tail", "<f4")])


def key(number: int) -> str:
    return question_key([{"role": "user", "content": f"question {number}"}], GREEDY, 0)


def answer(number: int) -> Answer:
    return Answer(f"answer {number} ✓\u2028\n", "stop", "big-v1", 7, 3)


def test_an_answer_comes_back_as_it_was(tmp_path: Path) -> None:
    logits = np.zeros(2, RECORD)
    logits["ids"], logits["log_probs"], logits["tail"] = [[1, 2, 3, 4], [5, 6, 7, 8]], -0.5, -3.25
    token = {"token": "ja", "logprob": -0.1, "top_logprobs": [{"token": "ja", "logprob": -0.1}]}
    full = Answer("ja \ud800", "length", "m", 11, 2, (4, 2), logits, (token,))
    for turn in range(2):  # just written, and read by another process
        with AnswerCache(tmp_path, IDENTITY, GREEDY) as cache:
            if turn == 0:
                cache.put(key(0), full)
                cache.put(key(1), answer(1))
                cache.put(key(1), answer(2))  # the first one stays
            found = cache.get(key(0))
            assert found is not None
            assert found.logits is not None
            np.testing.assert_array_equal(found.logits, logits)
            assert found.logits.dtype == RECORD
            assert (found.text, found.finish_reason, found.num_tokens) == (full.text, "length", 2)
            assert (found.token_ids, found.top_logprobs) == ((4, 2), (token,))
            assert cache.get(key(1)) == answer(1)
            assert cache.get(key(2)) is None
            assert (key(1) in cache, key(2) in cache, len(cache)) == (True, False, 2)


def test_teachers_and_decodings_do_not_mix(tmp_path: Path) -> None:
    with AnswerCache(tmp_path, IDENTITY, GREEDY) as cache:
        cache.put(key(0), answer(0))
        about = json.loads((cache.path / "about.json").read_text())
    assert "model big" in about["what"]
    assert "max_new_tokens 64" in about["what"]
    assert about["teacher"] == IDENTITY
    for identity, decoding, shared in (
        (IDENTITY, Decoding(64, temperature=0.5), True),  # greedy answers do not depend on it
        (IDENTITY, Decoding(65), False),
        (IDENTITY, Decoding(64, greedy=False), False),
        (IDENTITY | {"model": "small"}, GREEDY, False),
    ):
        with AnswerCache(tmp_path, identity, decoding) as cache:
            assert (key(0) in cache) is shared


def test_reading_alone_writes_nothing(tmp_path: Path) -> None:
    with AnswerCache(tmp_path / "absent", IDENTITY, GREEDY) as cache:
        assert cache.get(key(0)) is None
    assert not (tmp_path / "absent").exists()


WRITER = """
import os, sys
sys.path[:0] = sys.argv[3:]
import numpy as np
from pathlib import Path
from tests.teachers.test_cache import GREEDY, IDENTITY, RECORD, answer, key
from slmops.teachers.cache import AnswerCache
from dataclasses import replace
first = int(sys.argv[2])
with AnswerCache(Path(sys.argv[1]), IDENTITY, GREEDY) as cache:
    os.write(1, f"{len(cache)}\\n".encode())
    os.read(0, 1)
    for number in range(first, first + 1_000_000):
        if key(number) not in cache:
            cache.put(key(number), replace(answer(number), logits=np.full(50, number % 100, RECORD)))
            os.write(1, f"{number}\\n".encode())
"""


def _writer(directory: Path, first: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(directory), str(first), os.getcwd()]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_writers_that_are_killed_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """Two at a time, each killed at some moment in the middle of its work; then the next two go on."""
    chance = random.Random(5)
    put: Counter[int] = Counter()
    known = 0
    for _ in range(3):
        with _writer(tmp_path, 0) as one, _writer(tmp_path, 10_000_000) as other:
            counts = [int(writer.stdout.readline()) for writer in (one, other) if writer.stdout]
            for writer in (one, other):
                assert writer.stdin
                writer.stdin.write(b"\n")
                writer.stdin.flush()
            time.sleep(chance.uniform(0.05, 0.3))
            for writer in (one, other):
                writer.send_signal(signal.SIGKILL)
                assert writer.stdout
                put.update(int(line) for line in writer.stdout.read().split(b"\n")[:-1])
        assert counts == [known, known], "each starts with all that was put"
        # A kill between an answer and the word of it may leave one more answer than was heard of.
        with AnswerCache(tmp_path, IDENTITY, GREEDY) as cache:
            put.update(_unheard(cache, put))
            known = len(cache)
    assert sum(put.values()) > 200
    assert set(put.values()) == {1}, "none was written twice"
    with AnswerCache(tmp_path, IDENTITY, GREEDY) as cache:
        assert len(cache) == len(put)
        assert cache.num_damaged == 0
        for number in put:
            found = cache.get(key(number))
            assert found is not None
            assert found.text == answer(number).text
            assert found.logits is not None
            assert (found.logits == np.full(50, number % 100, RECORD)).all()


def _unheard(cache: AnswerCache, put: Counter[int]) -> list[int]:
    after = [max((n for n in put if n // 10_000_000 == half), default=half * 10_000_000 - 1) + 1 for half in (0, 1)]
    return [number for number in after if key(number) in cache]


def test_a_kill_at_any_byte_costs_one_answer_at_most(tmp_path: Path) -> None:
    with AnswerCache(tmp_path, IDENTITY, GREEDY) as cache:
        for number in range(3):
            cache.put(key(number), answer(number))
    (segment,) = cache.path.glob("*.jsonl")
    whole = segment.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        segment.write_bytes(whole[:length])
        with AnswerCache(tmp_path, IDENTITY, GREEDY) as cache:
            assert len(cache) == sum(end <= length for end in ends)
            assert cache.num_damaged == 0
            assert [cache.get(key(number)) for number in range(len(cache))] == [answer(n) for n in range(len(cache))]


@pytest.mark.parametrize("what", ["line", "logits"])
def test_a_damaged_answer_is_asked_again(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    with AnswerCache(tmp_path, IDENTITY, GREEDY) as cache:
        for number in range(3):
            cache.put(key(number), Answer(f"{number}", "stop", "m", logits=np.full(5, number, RECORD)))
        # Damage while it is open, and before it is opened.
        (file,) = cache.path.glob("*.jsonl" if what == "line" else "*.logits")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        assert cache.get(key(1)) is None
        assert key(1) not in cache
        assert cache.num_damaged == 1
        assert "damaged record is left out" in caplog.text
    with AnswerCache(tmp_path, IDENTITY, GREEDY) as cache:
        again = cache.get(key(1))
        assert again is None
        assert cache.num_damaged == 1
        cache.put(key(1), Answer("better", "stop", "m"))
        found = [cache.get(key(number)) for number in range(3)]
    assert [one and one.text for one in found] == ["0", "better", "2"]


def test_a_full_disk_keeps_what_was_put(small_disk: Path) -> None:
    text = "x" * 1000
    with AnswerCache(small_disk, IDENTITY, GREEDY) as cache:
        for number in range(300):
            cache.put(key(number), Answer(text, "stop", "m"))
        with pytest.raises(DiskFullError, match=r"no space left while writing .*; free some space"):
            cache.put(key(300), Answer(text * 1000, "stop", "m"))
        cache.put(key(301), answer(301))
    with AnswerCache(small_disk, IDENTITY, GREEDY) as cache:
        assert len(cache) == 301
        assert cache.get(key(301)) == answer(301)
        assert cache.num_damaged == 0


def test_memory_grows_by_less_than_thirty_bytes_an_answer(tmp_path: Path) -> None:
    num = 40_000
    with AnswerCache(tmp_path, IDENTITY, GREEDY) as cache:
        for number in range(num):
            cache.put(f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}{number:016x}", Answer("a", "stop", "m"))
        assert len(cache) == num
    tracemalloc.start()
    cache = AnswerCache(tmp_path, IDENTITY, GREEDY)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    with cache:
        assert len(cache) == num
        assert size / num < 30
