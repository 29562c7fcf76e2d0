"""Several answers in one batch: the same as each alone, whoever joins and leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops import cpus
from slmops.errors import DataError, ModelError
from slmops.inference.batch import Batch, Stream
from slmops.inference.batched import BatchedRuntime, likeliest
from slmops.inference.genai import GenAIRuntime
from slmops.inference.runtime import open_runtime
from slmops.inference.sampling import Sampling, of_search
from slmops.inference.slots import NoSlotsError, Slots

pytestmark = pytest.mark.slow

PROMPTS = [[5, 9, 200], [7] * 40, [11, 12, 13, 14], list(range(20, 120)), [30, 31]]


@pytest.fixture(scope="module")
def variant(tiny_variants: Path) -> Path:
    return tiny_variants / "cpu-int4"


@pytest.fixture(scope="module")
def runtime(variant: Path) -> BatchedRuntime:
    return BatchedRuntime(variant, num_threads=1, num_slots=3)


@pytest.fixture(scope="module")
def alone(variant: Path) -> GenAIRuntime:
    return GenAIRuntime(variant, num_threads=1)


def run(runtime: BatchedRuntime, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Answers of exactly these lengths."""
    batch, answers = Batch[Stream](runtime.slots), [list[int]() for _ in prompts]
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True):
        batch.add(Stream(prompt, length, likeliest, answer.append))
    while batch:
        batch.step()
    return answers


def test_answers_in_a_batch_are_those_of_the_public_runtime(runtime: BatchedRuntime, alone: GenAIRuntime) -> None:
    """More streams than slots, of different lengths, so that streams join, leave and take others' places."""
    lengths = [30, 3, 17, 25, 9]
    expected = []
    for prompt, length in zip(PROMPTS, lengths, strict=True):
        generator = alone._generator(len(prompt) + length, min_length=0)
        generator.append_tokens(prompt)
        logits, answer = generator.get_output("logits")[0, -1], list[int]()
        while len(answer) < length:  # the end of a turn is a token like others here
            answer.append(int(logits.argmax()))
            generator.append_tokens(answer[-1:])
            logits = generator.get_output("logits")[0, -1]
        expected.append(answer)
    assert run(runtime, PROMPTS, lengths) == expected


def test_logits_and_losses_are_those_of_the_public_runtime(runtime: BatchedRuntime, alone: GenAIRuntime) -> None:
    ids = [int(token) for token in np.random.default_rng(0).integers(3, 250, 600)]  # read in several calls
    np.testing.assert_allclose(runtime.logits(ids), alone.logits(ids), atol=1e-4)
    ours, theirs = (each.log_likelihoods(ids[:50], 20) for each in (runtime, alone))
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
    assert ours[1] == theirs[1]


def test_no_more_logits_are_computed_than_are_wanted(runtime: BatchedRuntime) -> None:
    ids = list(range(20, 120))
    end, whole = runtime.slots.read(ids, 0, all_logits=True)
    assert (end, len(whole)) == (100, 100)
    end, last = runtime.slots.read(ids, 0)
    assert (end, len(last)) == (100, 1)
    np.testing.assert_allclose(last[0], whole[-1], atol=1e-4)


def test_answers_end_with_the_turn(runtime: BatchedRuntime, alone: GenAIRuntime) -> None:
    prompts = [[{"role": "user", "content": text}] for text in ("lamp on", "what is the time in the hall?", "off")]
    assert runtime.answer(prompts, 40) == alone.answer(prompts, 40)
    assert list(runtime.stream(prompts[0], 40)) == list(alone.stream(prompts[0], 40))


def test_a_reader_who_leaves_leaves_nothing_behind(runtime: BatchedRuntime) -> None:
    next(runtime.continue_ids(PROMPTS[1], 40))
    assert runtime.slots.lengths == []


def test_a_stream_that_nobody_wants_makes_room(runtime: BatchedRuntime) -> None:
    batch, kept = Batch[Stream](runtime.slots), list[int]()
    streams = [Stream(prompt, 50, likeliest, lambda _: None) for prompt in PROMPTS[:3]]
    for stream in (*streams, Stream(PROMPTS[3], 5, likeliest, kept.append)):
        batch.add(stream)
    for _ in range(4):
        batch.step()
    assert len(runtime.slots.lengths) == 3
    assert not kept
    streams[1].gone = True
    for _ in range(10):
        batch.step()
    assert len(kept) == 5
    assert batch.clear() == [streams[0], streams[2]]
    assert not batch
    assert runtime.slots.lengths == []


def test_an_answer_ends_where_the_context_does(runtime: BatchedRuntime) -> None:
    length = runtime.context_length
    prompt = [5] * (length - 3)
    assert [len(answer) for answer in run(runtime, [prompt, [5] * length], [50, 50])] == [4, 1]
    with pytest.raises(DataError, match=f"{length + 1:,} tokens"):
        runtime.logits([5] * (length + 1))


def test_memory_is_taken_by_tokens_and_given_back(variant: Path) -> None:
    """Of each slot by itself: another stream is at work all the time."""
    slots, ids = Slots(variant, num_slots=64, num_threads=1), [5] * 1000

    def join(length: int) -> None:
        read = 0
        while read < length:
            read, _ = slots.read(ids[:length], read)
        slots.join(read)

    join(20)
    empty = _resident_bytes()
    for _ in range(20):
        join(1000)
    token = slots._caches[:, 0, :, 0].nbytes
    full = _resident_bytes()
    assert 20 * 1000 * token < full - empty < 30 * 1000 * token < slots._caches.nbytes / 2
    expected = slots._caches[:, 20, :, :1000].copy()
    slots.leave(5)
    np.testing.assert_array_equal(slots._caches[:, 5, :, :1000], expected)
    while len(slots.lengths) > 1:
        slots.leave(1)
    assert full - _resident_bytes() > 20 * 500 * token
    assert slots.lengths == [20]


def test_streams_wait_for_memory(runtime: BatchedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, most = [6, 4, 5, 3, 7], list[int]()
    expected, step = run(runtime, PROMPTS, lengths), Slots.step

    def watched(slots: Slots, tokens: list[int]) -> object:
        most.append(sum(slots.lengths))
        return step(slots, tokens)

    monkeypatch.setattr(Slots, "step", watched)
    assert run(runtime, PROMPTS, lengths) == expected
    assert max(most) > 60
    most.clear()
    monkeypatch.setattr(runtime.slots, "max_tokens", 60)
    assert run(runtime, PROMPTS, lengths) == expected
    assert max(most) > 60, "one alone is never kept waiting"
    assert max(tokens for tokens in most if tokens < 100) <= 60


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _changed(variant: Path, tmp_path: Path, change: Callable[[Any], object]) -> Path:
    directory = tmp_path / f"changed-{next(NUMBERS)}"
    shutil.copytree(variant, directory)
    config = json.loads((directory / "genai_config.json").read_text())
    change(config)
    (directory / "genai_config.json").write_text(json.dumps(config))
    return directory


NUMBERS = count()


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model"]["decoder"]["session_options"].update(provider_options=[{"cuda": {}}]),
        lambda config: config["model"]["decoder"].update(sliding_window={"window_size": 128}),
        lambda config: config["model"]["decoder"].update(num_hidden_layers=1),
        lambda config: config["search"].update(past_present_share_buffer=False),
    ],
    ids=["provider", "window", "keys and values", "growth"],
)
def test_a_variant_that_cannot_share_a_batch_is_known(
    variant: Path, tmp_path: Path, change: Callable[[Any], object]
) -> None:
    with pytest.raises(NoSlotsError):
        Slots(_changed(variant, tmp_path, change), num_slots=2, num_threads=1)


def test_what_cannot_share_a_batch_runs_in_the_public_runtime(variant: Path, tmp_path: Path) -> None:
    windowed = _changed(variant, tmp_path, lambda config: config["model"]["decoder"].update(pipeline=[{}]))
    assert isinstance(open_runtime(windowed, quantized=True, dtype="auto", num_threads=1), GenAIRuntime)
    assert isinstance(open_runtime(variant, quantized=True, dtype="auto", num_threads=1), BatchedRuntime)


def test_a_damaged_graph_is_an_error(variant: Path, tmp_path: Path) -> None:
    directory = _changed(variant, tmp_path, lambda _: None)
    (directory / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="run quantize again"):
        Slots(directory, num_slots=1, num_threads=1)


def test_tokens_are_drawn_with_their_probability() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    generator = np.random.default_rng(1)

    def share(sampling: Sampling) -> list[float]:
        drawn = [sampling.choose(logits, generator) for _ in range(20_000)]
        return [drawn.count(token) / len(drawn) for token in range(4)]

    assert share(Sampling(1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.02)
    assert share(Sampling(1.0, top_p=0.75)) == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.02)
    assert share(Sampling(1.0, top_k=3)) == pytest.approx([10 / 19, 6 / 19, 3 / 19, 0], abs=0.02)
    sharp = np.array([0.25, 0.09, 0.0225, 0.0025])
    assert share(Sampling(0.5)) == pytest.approx(sharp / sharp.sum(), abs=0.02)
    assert share(Sampling()) == share(Sampling(2.0, top_k=1)) == share(Sampling(2.0, top_p=0.1)) == [1, 0, 0, 0]


def test_many_equal_tokens_are_all_drawn() -> None:
    """More than are sorted first."""
    sampling, generator = Sampling(1.0, top_p=0.99), np.random.default_rng(1)
    drawn = {sampling.choose(np.zeros(1000, np.float32), generator) for _ in range(20_000)}
    assert len(drawn) == 990


def test_a_models_own_search_settings() -> None:
    assert of_search({"do_sample": False, "top_k": 50, "temperature": 0.7}) == Sampling()
    own = of_search({"do_sample": True, "top_k": 50, "top_p": 0.9, "temperature": 0.7, "num_beams": 1})
    assert own == Sampling(0.7, 50, 0.9)
    with pytest.raises(NoSlotsError, match=r"repetition_penalty is 1\.1"):
        of_search({"do_sample": False, "repetition_penalty": 1.1})


@pytest.mark.parametrize(("text", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64)])
def test_a_containers_quota_limits_the_threads(
    text: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{text}\n")
    monkeypatch.setattr(cpus, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cpus.count() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpus.count() == 3
