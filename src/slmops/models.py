"""Model directories in the Hugging Face layout: checked before anything is loaded, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from slmops import __version__, artifacts
from slmops.artifacts import SIDECAR, Kind, Sidecar
from slmops.errors import ArtifactError, ModelError, explain_os_errors

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""

FULL_PRECISION = "full_precision"
"""Name of the variant that is the Hugging Face directory itself."""


def open_model(path: Path) -> Sidecar:
    """The sidecar of a model directory; for one that slmops did not write, a sidecar made from its files.

    Raises:
        ArtifactError: it is missing or half-written.
        ModelError: it is no Hugging Face model directory with safetensors weights and a tokenizer.
    """
    if not path.is_dir():
        if path.with_name(path.name + ".partial").exists():
            raise ArtifactError(f"{path} is not there: the step that writes it did not finish; run that step again")
        raise ArtifactError(f"{path} is no directory; give a model directory in the Hugging Face layout")
    if (path / SIDECAR).exists():
        return artifacts.expect(path, "hf_model")
    config = read_config(path)
    num_weights(path)
    if not (path / "tokenizer.json").is_file():
        raise ModelError(f"{path} has no tokenizer.json; save the model's tokenizer into the same directory")
    return _imported(path, "hf_model", {"model_type": config.get("model_type", "unknown")})


def open_variant(path: Path) -> Sidecar:
    """A sidecar made from the files of one quantized variant's directory.

    Raises:
        ArtifactError: it is no directory of ONNX Runtime GenAI or ExecuTorch.
    """
    if not any((path / name).is_file() for name in ("genai_config.json", "executorch_config.json")):
        raise ArtifactError(
            f"{path} has no genai_config.json; give one variant's directory, such as cpu-int4 in what quantize wrote"
        )
    return _imported(path, "variants", {})


def _imported(path: Path, kind: Kind, facts: dict[str, Any]) -> Sidecar:
    """The sidecar of files that no step of slmops has written one for."""
    files = tuple(artifacts.list_files(path))
    return Sidecar(
        kind=kind,
        digest=artifacts.digest_of(files),
        step="import",
        created_at=datetime.fromtimestamp(max((path / f.path).stat().st_mtime for f in files), UTC),
        duration_s=0.0,
        slmops_version=__version__,
        facts={"source": path.name, **facts},
        files=files,
    )


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a model directory.

    Raises:
        ModelError: it is absent or no JSON object with an architecture.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ModelError(f"{path} has no config.json; give a model directory in the Hugging Face layout")
    with explain_os_errors(config_path):
        text = config_path.read_text()
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{config_path} is not JSON ({error}); save the model again") from None
    if not isinstance(config, dict) or not config.get("architectures"):
        raise ModelError(f"{config_path} names no architecture; save the model with save_pretrained")
    return config


def tokenizer_digest(path: Path) -> str:
    """SHA-256 of what turns text into token ids: vocabulary, merges, added tokens, normalisation."""
    with explain_os_errors(path):
        return digest_of_tokenizer(json.loads((path / "tokenizer.json").read_text(encoding="utf-8")))


def digest_of_tokenizer(tokenizer: dict[str, Any]) -> str:
    """`tokenizer_digest` of what a tokenizer.json holds."""
    # Padding and truncation say how a batch is made up, not what a token is.
    kept = {name: value for name, value in tokenizer.items() if name not in {"padding", "truncation"}}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def template_digest(path: Path) -> str:
    """SHA-256 of what turns a conversation into text: the chat template, wherever the directory keeps it.

    Raises:
        ModelError: there is none.
    """
    with explain_os_errors(path):
        file = path / "chat_template.jinja"
        template: Any = file.read_text(encoding="utf-8") if file.is_file() else None
        if template is None and (path / "tokenizer_config.json").is_file():
            template = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    if not template:
        raise no_chat_template(path)
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def no_chat_template(path: Path) -> ModelError:
    """The error of a model that cannot be asked, because nothing says how a conversation is put to it."""
    return ModelError(f"{path} has no chat template; add chat_template.jinja to the model directory")


def num_weights(path: Path) -> int:
    """The number of weights in a model directory, by the headers of its files, which are checked against their sizes.

    Raises:
        ModelError: a file is missing or cut short.
    """
    index = path / WEIGHTS_INDEX
    names = [WEIGHTS]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    total = 0
    for name in names:
        file = path / name
        if not file.is_file():
            raise ModelError(f"{path} has no {name}; convert the weights to safetensors, or copy the model again")
        with explain_os_errors(file), open(file, "rb") as weights:
            total += check_weights(
                str(file), file.stat().st_size, lambda start, length: _read_at(weights, start, length)
            )
    return total


def check_weights(name: str, size_bytes: int, read: Callable[[int, int], bytes]) -> int:
    """The number of weights in a safetensors file, from its header alone.

    Args:
        name: What to call the file in an error.
        size_bytes: How large it is.
        read: Reads a number of bytes (the second argument) from an offset (the first).

    Raises:
        ModelError: it is no safetensors file, or shorter or longer than its header says.
    """
    try:
        (header_bytes,) = struct.unpack("<Q", read(0, 8))
        header = json.loads(read(8, min(header_bytes, MAX_HEADER_BYTES)))
        header.pop("__metadata__", None)
        data_bytes = max(entry["data_offsets"][1] for entry in header.values())
        num_weights = sum(math.prod(entry["shape"]) for entry in header.values())
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{name} has no valid safetensors header; copy the model again") from None
    expected = 8 + header_bytes + data_bytes
    if size_bytes != expected:
        raise ModelError(f"{name} has {size_bytes:,} bytes where its header says {expected:,}; copy the model again")
    return int(num_weights)


def _read_at(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)
