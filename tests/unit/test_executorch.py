"""ExecuTorch variants: exported from real small models, and run by ExecuTorch itself.

What exports or runs is skipped where the package `executorch` is not installed; what is refused before that is not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slmops.benchmark.config import BenchmarkConfig
from slmops.benchmark.run import run as benchmark
from slmops.errors import ArtifactError, DataError, ModelError
from slmops.evaluate.config import EvaluateConfig
from slmops.evaluate.run import run as evaluate
from slmops.inference.conversation import Conversation
from slmops.inference.executorch_files import PROGRAM, SETTINGS, is_executorch, read_settings
from slmops.inference.executorch_runtime import ExecuTorchRuntime
from slmops.inference.torch_runtime import TorchRuntime
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.executorch_backend import build
from slmops.quantize.run import run as quantize
from slmops.records import ChatRecord, Message, id_of
from slmops.training.batches import encode

executorch = pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="executorch is not installed")

CONTEXT = 256

PROMPTS = [
    [{"role": "user", "content": "Turn on the lights in the kitchen"}],
    [
        {"role": "system", "content": "Answer in JSON."},
        {"role": "user", "content": "Set the heating to 21.5 °C\n\nnow"},
    ],
    [{"role": "user", "content": "Close all blinds. " * 20}],
]
"""The last has more tokens than the program takes in one call."""


def make_model(tiny_model: Path, path: Path, *, spread: float = 0.3, **changes: Any) -> Path:
    """Two layers of random weights, of which a wide `spread` makes answers of many different tokens."""
    config = AutoConfig.from_pretrained(tiny_model).to_dict()
    kind = changes.pop("model_type", config.pop("model_type"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": spread}
    for name in ("architectures", "layer_types", "transformers_version"):
        config.pop(name, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(config | sizes | changes)))
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / name, path)
    return path


@pytest.fixture(scope="module")
def lively_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tiny_model, tmp_path_factory.mktemp("models") / "lively", head_dim=16)


@pytest.fixture(scope="module")
def exported(lively_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lively_model` in float32."""
    path = tmp_path_factory.mktemp("variants") / "float32"
    build(lively_model, path, precision="float32", context_length=CONTEXT)
    return path


@pytest.fixture
def runtime(exported: Path) -> ExecuTorchRuntime:
    return ExecuTorchRuntime(exported, num_threads=1)


@pytest.fixture
def reference(lively_model: Path) -> TorchRuntime:
    return TorchRuntime(lively_model, dtype="float32", num_threads=1)


def record_of(prompt: Sequence[dict[str, str]], answer: str) -> ChatRecord:
    messages = tuple(Message.model_validate(turn) for turn in [*prompt, {"role": "assistant", "content": answer}])
    return ChatRecord(id=id_of(messages), messages=messages)


def kl(reference: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """Mean KL(reference ‖ found) in nats of logits [tokens, vocabulary]."""
    expected, other = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (reference, found))
    return float((expected.exp() * (expected - other)).sum(-1).mean())


@pytest.mark.slow
@executorch
def test_float32_answers_as_torch_does(runtime: ExecuTorchRuntime, reference: TorchRuntime) -> None:
    for prompt in PROMPTS:
        found = list(runtime.stream(prompt, 24))
        assert found == list(reference.stream(prompt, 24))
        assert len(set(found)) > 4
    assert runtime.answer(PROMPTS, 16) == reference.answer(PROMPTS, 16)


@pytest.mark.slow
@executorch
def test_float32_scores_as_torch_does(runtime: ExecuTorchRuntime, reference: TorchRuntime) -> None:
    ids = [number % 1000 + 3 for number in range(0, 7 * CONTEXT, 7)]
    np.testing.assert_allclose(runtime.logits(ids), reference.logits(ids), atol=2e-4)
    records = [record_of(prompt, answer) for prompt in PROMPTS for answer in ("done", '{"room": "kitchen"} ' * 6)]
    for record in records:
        assert runtime.encode_row(record) == reference.encode_row(record)
    found, expected = runtime.answer_losses(records), reference.answer_losses(records)
    assert [count for _, count in found] == [count for _, count in expected]
    np.testing.assert_allclose([loss for loss, _ in found], [loss for loss, _ in expected], rtol=1e-5)


@pytest.mark.slow
@executorch
def test_each_token_is_read_once_and_the_cache_holds_what_a_recompute_finds(
    runtime: ExecuTorchRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    forward = runtime._forward

    def count(ids: Sequence[int], start: int, scored: Sequence[int]) -> torch.Tensor:
        read.extend(range(start, start + len(ids)))
        return forward(ids, start, scored)

    prompt = runtime.tokenizer.encode_messages(PROMPTS[2], to_answer=True)
    assert len(prompt) > read_settings(runtime.directory).max_tokens_per_call
    monkeypatch.setattr(runtime, "_forward", count)
    answer = list(runtime.continue_ids(prompt, 24, to_the_end=True))
    assert read == list(range(len(prompt) + 23))
    monkeypatch.undo()
    recomputed = runtime.logits([*prompt, *answer])
    assert recomputed[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.slow
@executorch
def test_answers_read_by_turns_do_not_disturb_each_other(runtime: ExecuTorchRuntime) -> None:
    alone = [list(runtime.stream(prompt, 8)) for prompt in PROMPTS[:2]]
    by_turns = zip(*(runtime.stream(prompt, 8) for prompt in PROMPTS[:2]), strict=True)
    assert [list(answer) for answer in zip(*by_turns, strict=True)] == alone


@pytest.mark.slow
@executorch
def test_a_prompt_beyond_the_context_is_refused_and_an_answer_ends_with_it(
    runtime: ExecuTorchRuntime, exported: Path
) -> None:
    assert len(list(runtime.continue_ids([5] * (CONTEXT - 3), 50, to_the_end=True))) == 3
    with pytest.raises(DataError, match=rf"the prompt has {CONTEXT} tokens.*room for 1 to {CONTEXT - 1}"):
        runtime.continue_ids([5] * CONTEXT, 1)
    with pytest.raises(DataError, match="longer context_length"):
        runtime.answer([[{"role": "user", "content": "Close all blinds. " * 400}]], 1)
    with pytest.raises(DataError, match="the row has"):
        runtime.answer_losses([record_of(PROMPTS[0], "yes " * 400)])
    assert len(runtime.logits([5] * CONTEXT)) == CONTEXT


@pytest.mark.slow
@executorch
@pytest.mark.parametrize(("precision", "max_kl", "max_size"), [("int8", 0.001, 0.4), ("int4", 0.03, 0.25)])
def test_few_bits_stay_near_and_are_small(
    precision: Any, max_kl: float, max_size: float, tiny_model: Path, tmp_path: Path
) -> None:
    model = make_model(tiny_model, tmp_path / "model", spread=0.05, hidden_size=128, intermediate_size=256, head_dim=32)
    build(model, tmp_path / "variant", precision=precision, context_length=CONTEXT)
    found = ExecuTorchRuntime(tmp_path / "variant", num_threads=1)
    reference = TorchRuntime(model, dtype="float32", num_threads=1)
    ids = [number % 1000 + 3 for number in range(0, 7 * 200, 7)]
    drift = kl(reference.logits(ids), found.logits(ids))
    print("DRIFT", precision, drift, (tmp_path / "variant" / PROGRAM).stat().st_size)
    assert 0 < drift < max_kl
    # Tied, the embedding is counted once in the model, and the program has it twice.
    weights = (model / "model.safetensors").stat().st_size + 1024 * 128 * 4
    assert (tmp_path / "variant" / PROGRAM).stat().st_size < max_size * weights
    answer = list(found.continue_ids(ids[:20], 12, to_the_end=True))
    assert found.logits([*ids[:20], *answer])[19:-1].argmax(-1).tolist() == answer


@pytest.mark.slow
@executorch
def test_another_architecture_answers_as_torch_does(tiny_model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 24}
    model = make_model(tiny_model, tmp_path / "model", **changes)
    build(model, tmp_path / "variant", precision="float32", context_length=64)
    found = ExecuTorchRuntime(tmp_path / "variant", num_threads=1)
    reference = TorchRuntime(model, dtype="float32", num_threads=1)
    assert list(found.stream(PROMPTS[0], 16)) == list(reference.stream(PROMPTS[0], 16))
    ids = list(range(100, 160))
    np.testing.assert_allclose(found.logits(ids), reference.logits(ids), atol=2e-4)


@pytest.mark.slow
@executorch
def test_damaged_directories_are_refused(exported: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(exported, tmp_path / name))

    flipped = copy("flipped")
    content = bytearray((flipped / PROGRAM).read_bytes())
    content[len(content) // 2] ^= 1
    (flipped / PROGRAM).write_bytes(content)
    cut = copy("cut")
    (cut / PROGRAM).write_bytes(content[:-1000])
    unknown = copy("unknown")
    settings = json.loads((unknown / SETTINGS).read_text())
    (unknown / SETTINGS).write_text(json.dumps(settings | {"custom_ops_library": "evil.so"}))
    gone = copy("gone")
    (gone / PROGRAM).unlink()
    broken = copy("broken")
    (broken / "tokenizer.json").write_text("{}")
    for directory, expected in (
        (flipped, "another SHA-256"),
        (cut, "bytes where"),
        (unknown, "custom_ops_library"),
        (gone, "has no model.pte"),
        (broken, "is no tokenizer"),
    ):
        with pytest.raises(ModelError, match=expected):
            ExecuTorchRuntime(directory, num_threads=1)


@pytest.mark.slow
@executorch
@pytest.mark.parametrize("keep", [0.1, 0.6])
def test_a_program_that_is_none_is_refused_by_executorch_itself(exported: Path, tmp_path: Path, keep: float) -> None:
    """Its digest fits: it was written so."""
    directory = Path(shutil.copytree(exported, tmp_path / "variant"))
    content = (directory / PROGRAM).read_bytes()
    content = content[: int(len(content) * keep)]
    (directory / PROGRAM).write_bytes(content)
    settings = json.loads((directory / SETTINGS).read_text())
    settings |= {"program_size_bytes": len(content), "program_sha256": hashlib.sha256(content).hexdigest()}
    (directory / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="cannot be loaded by executorch"):
        ExecuTorchRuntime(directory, num_threads=1)


@pytest.mark.slow
@executorch
def test_a_device_needs_neither_transformers_nor_the_exporter(exported: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from slmops.inference.executorch_runtime import ExecuTorchRuntime\n"
        f"runtime = ExecuTorchRuntime(Path({str(exported)!r}), num_threads=1)\n"
        "runtime.answer([[{'role': 'user', 'content': 'hello'}]], 4)\n"
        "heavy = ('transformers', 'torchao', 'executorch.exir', 'slmops.training', 'slmops.quantize', 'slmops.demo')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "changes with the length"),
    ],
)
def test_models_that_would_come_out_wrong_are_refused(
    changes: dict[str, Any], expected: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_installed(monkeypatch)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=expected):
        build(model, tmp_path / "variant", precision="int4", context_length=CONTEXT)
    assert not (tmp_path / "variant").exists()


def test_a_sliding_window_is_refused_unless_the_context_fits_into_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_installed(monkeypatch)
    model = make_model(tiny_model, tmp_path / "model", model_type="mistral", sliding_window=128)
    with pytest.raises(ModelError, match="the last 128 tokens only: give a context_length of at most that"):
        build(model, tmp_path / "variant", precision="float32", context_length=129)


def test_all_that_is_wrong_with_sizes_is_said_at_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_installed(monkeypatch)
    with pytest.raises(ModelError) as refused:
        build(tiny_model, tmp_path / "variant", precision="int4", context_length=4096, block_size=48)
    for part in ("from 16 to the model's 1,024, got 4,096", "multiple of 32", "do not divide its widths 128, 256"):
        assert part in str(refused.value)


@pytest.mark.parametrize("end", [None, 1024])
def test_a_model_whose_answers_never_end_is_refused_before_it_is_exported(
    end: int | None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_installed(monkeypatch)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for name, key, value in (
        ("config.json", "eos_token_id", end),
        ("generation_config.json", "eos_token_id", end),
        ("tokenizer_config.json", "eos_token", None),
    ):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(content | {key: value}))
    with pytest.raises(ModelError, match="what ends an answer must be tokens of the embedding: set eos_token_id"):
        build(model, tmp_path / "variant", precision="int8", context_length=CONTEXT)


def test_a_missing_package_is_named(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'slmops\[executorch\]'"):
        build(tiny_model, tmp_path / "variant", precision="int4", context_length=CONTEXT)
    with pytest.raises(ModelError, match=r"pip install 'slmops\[executorch\]'"):
        ExecuTorchRuntime(tmp_path / "variant", num_threads=1)


def test_settings_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    assert not is_executorch(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_settings(tmp_path)
    (tmp_path / SETTINGS).write_text("{")
    assert is_executorch(tmp_path)
    with pytest.raises(ModelError, match="run quantize again"):
        read_settings(tmp_path)
    settings = {
        "program_size_bytes": 1,
        "program_sha256": "0" * 64,
        "executorch_version": "1.5.1",
        "architecture": "LlamaForCausalLM",
        "precision": "int8",
        "block_size": 32,
        "context_length": 64,
        "max_tokens_per_call": 64,
        "max_scored_per_call": 32,
        "vocabulary_size": 1024,
        "end_token_ids": [2],
    }
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="block_size belongs to int4"):
        read_settings(tmp_path)


def test_conversations_have_the_tokens_that_transformers_finds(tiny_model: Path, reference: TorchRuntime) -> None:
    conversation = Conversation(tiny_model)
    for prompt in PROMPTS:
        for to_answer in (True, False):
            found = conversation.encode_messages(prompt, to_answer=to_answer)
            assert found == encode(reference.tokenizer, prompt, to_answer=to_answer)
        assert conversation.decode(found) == reference.tokenizer.decode(found, skip_special_tokens=True)


def test_a_template_that_refuses_a_conversation_says_why(tiny_model: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
    with pytest.raises(DataError, match="refuses the conversation: no system turns"):
        Conversation(directory).encode_messages(PROMPTS[1], to_answer=True)
    (directory / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ModelError, match="is no Jinja template"):
        Conversation(directory)


def _pretend_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is refused before the package is used."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@executorch
def test_a_second_backend_is_built_run_measured_and_evaluated_as_the_first(
    tiny_teacher: Path, held_out_rows: Path, tmp_path: Path
) -> None:
    config = QuantizeConfig(variants=["cpu-int8", "cpu-int8-executorch"], context_length=128)
    built = quantize(config, model=tiny_teacher, variants=tmp_path / "variants", calibration=held_out_rows)
    facts = built.facts["variants"]["cpu-int8-executorch"]
    assert (facts["backend"], facts["ran"]) == ("executorch", True)
    assert facts["drift_kl"] < 0.1
    settings = EvaluateConfig(variant="cpu-int8-executorch", max_new_tokens=16, max_rows=16, num_injections=0)
    found = evaluate(
        settings, model=tmp_path / "variants", test=held_out_rows, evaluation=tmp_path / "e", reference=tiny_teacher
    ).facts
    assert found["runtime"].startswith("executorch")
    assert found["accuracy"] > 0.7
    assert found["drift"]["answer_kl_mean"] < 0.1
    measured = benchmark(
        BenchmarkConfig(variant="cpu-int8-executorch", num_requests=3, num_repeats=1, max_new_tokens=8),
        model=tmp_path / "variants",
        prompts=held_out_rows,
        benchmark=tmp_path / "b",
    ).facts
    assert measured["status"] == "measured"
    assert measured["tokens_per_s"] > 0
