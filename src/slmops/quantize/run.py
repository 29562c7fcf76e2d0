"""quantize: one ONNX Runtime GenAI directory for each variant, built by Olive and run once before it counts."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from slmops import artifacts, models
from slmops.artifacts import Sidecar
from slmops.errors import DiskFullError, ModelError
from slmops.progress import heartbeat, log
from slmops.quantize.config import QuantizeConfig

STEP = "quantize"

OLIVE_REPORTS = (
    "footprint.json",
    "input_footprint.json",
    "output_footprint.json",
    "model_config.json",
    "run_history.txt",
)
"""Files that Olive leaves beside a model; they hold times and paths, and no runtime reads them."""

BUILDER = "GenAIModelBuilder"
"""Name of the class of our Olive pass, which loads only with Olive."""

PRECISION = {"cpu-int4": "int4", "cpu-int8": "int8"}
"""The builder's name for the weights of each variant."""


def run(config: QuantizeConfig, *, model: Path, variants: Path) -> Sidecar:
    """Quantize the weights of `model` to each of `config.variants`, one directory each.

    Raises:
        ArtifactError: the model is missing or half-written.
        ModelError: the exporter does not know the architecture, or what it wrote does not run.
        DiskFullError: the device is full.
    """
    parents = [models.open_model(model)]
    with artifacts.writing(variants, kind="variants", step=STEP, config=config, parents=parents) as draft:
        built: dict[str, Any] = {}
        for name in config.variants:
            log.info("building %s (%s, block size %d)", name, config.algorithm, config.block_size)
            directory = draft.path / name
            build(model, directory, name, config)
            check_runs(directory)
            files = list(artifacts.list_files(directory))
            size_bytes = sum(entry.size_bytes for entry in files)
            built[name] = {"digest": artifacts.digest_of(files), "size_bytes": size_bytes}
            log.info("%s has %.1f MB", name, size_bytes / 1e6)
        draft.facts["variants"] = built
    return draft.sidecar


def build(model: Path, directory: Path, variant: str, config: QuantizeConfig) -> None:
    """Have Olive write `variant` of `model` to `directory`.

    Raises:
        ModelError: Olive's pass failed; Olive itself only logs that.
        DiskFullError: the device is full.
    """
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".olive-") as scratch:
        found = _run_olive(_workflow(model, variant, config, scratch), scratch, model, variant)
        if not (found / "genai_config.json").is_file():
            raise ModelError(f"Olive wrote no genai_config.json for {variant} of {model}; choose another algorithm")
        for name in OLIVE_REPORTS:
            (found / name).unlink(missing_ok=True)
        shutil.move(found, directory)


def _workflow(model: Path, variant: str, config: QuantizeConfig, scratch: str) -> dict[str, Any]:
    """Olive's run configuration: one pass, the builder's."""
    return {
        "input_model": {"type": "HfModel", "model_path": str(model.resolve())},
        "systems": {"host": {"type": "LocalSystem", "accelerators": [{"device": "cpu"}]}},
        "host": "host",
        "target": "host",
        "passes": {
            "build": {
                "type": BUILDER,
                "precision": PRECISION[variant],
                "block_size": config.block_size,
                "algorithm": config.algorithm,
            }
        },
        "output_dir": f"{scratch}/output",
        "cache_dir": f"{scratch}/cache",
    }


def _run_olive(workflow: dict[str, Any], scratch: str, model: Path, variant: str) -> Path:
    """Run Olive, held back from the screen and from what it changes in the process; the directory it wrote."""
    os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("CI", "true")  # the second switch: Olive sends a heartbeat before it looks at the first
    from olive.workflows import run as run_olive

    from slmops.quantize.model_builder import GenAIModelBuilder

    GenAIModelBuilder.failure = None
    said = io.StringIO()
    package = {"passes": {BUILDER: {"module_path": f"{GenAIModelBuilder.__module__}.{BUILDER}"}}}
    tempdir, disabled = tempfile.tempdir, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            heartbeat(f"building {variant}", lambda: _last_line(said.getvalue()).partition(" in /")[0]),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            output = run_olive(workflow, package_config=package, tempdir=scratch)
    finally:
        logging.disable(disabled)
        tempfile.tempdir = tempdir  # Olive sets it for the whole process
    if GenAIModelBuilder.failure or not output.has_output_model():
        reason = _last_line(said.getvalue()) or "it gave no reason"
        raise _explain(GenAIModelBuilder.failure or reason, model, variant)
    found = Path(output.get_best_candidate().model_path)
    return found if found.is_dir() else found.parent


def _explain(failure: Exception | str, model: Path, variant: str) -> ModelError | DiskFullError:
    """What a failed pass means for the user."""
    text = str(failure)
    if "No space left" in text:
        return DiskFullError(f"no space left while building {variant}; free some space and run it again")
    if isinstance(failure, NotImplementedError):
        architecture = models.read_config(model)["architectures"][0]
        return ModelError(
            f"the exporter does not know the architecture {architecture} of {model} ({text}); use a student of another "
            "family, such as Llama, Qwen, Phi, Gemma or SmolLM"
        )
    return ModelError(f"Olive could not build {variant} of {model}: {text}")


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or [""])[-1]


def check_runs(directory: Path) -> None:
    """Load a variant as an edge node does, and have it answer.

    Raises:
        ModelError: it cannot be loaded, or does not run.
    """
    from slmops.inference.genai import GenAIRuntime

    runtime = GenAIRuntime(directory, num_threads=len(os.sched_getaffinity(0)))
    prompt = [{"role": "user", "content": "hello"}]
    try:
        runtime.answer([prompt], max_new_tokens=4)
    except Exception as error:  # what the runtime raises is not documented
        raise ModelError(
            f"{directory} loads but does not run: {error}; choose another algorithm or block_size"
        ) from error
