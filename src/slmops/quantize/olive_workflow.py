"""Running Olive: a list of passes over one model, held back from the screen and from what it changes in the process."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops import models
from slmops.errors import DiskFullError, ModelError
from slmops.progress import heartbeat

PASSES = {
    "Gptq": "olive.passes.pytorch.gptq.Gptq",
    "Rtn": "olive.passes.pytorch.rtn.Rtn",
    "GenAIModelBuilder": "slmops.quantize.model_builder.GenAIModelBuilder",
    "ActivationAwareScale": "slmops.quantize.awq_pass.ActivationAwareScale",
}
"""All passes that Olive may run here, and where they are. Of its own most do not work as this project needs them."""

REPORTS = ("footprint.json", "input_footprint.json", "output_footprint.json", "model_config.json", "run_history.txt")
"""Files that Olive leaves beside a model; they hold times and paths, and no runtime reads them."""


def run_passes(
    model: Path, passes: Mapping[str, dict[str, Any]], directory: Path, what: str, data: dict[str, Any] | None = None
) -> None:
    """Have Olive run `passes`, by the class name of each, over `model` in their order; the result goes to `directory`.

    Args:
        model: a Hugging Face directory.
        passes: settings by the name of the pass.
        directory: where the last pass's output goes; it does not exist yet.
        what: what to call the work in progress and errors, such as `cpu-int4`.
        data: Olive's data configuration, for passes that calibrate.

    Raises:
        ModelError: a pass failed, or wrote nothing; Olive itself only logs that.
        DiskFullError: the device is full.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".olive-") as scratch:
        workflow = {
            "input_model": {"type": "HfModel", "model_path": str(model.resolve())},
            "systems": {"host": {"type": "LocalSystem", "accelerators": [{"device": "cpu"}]}},
            "host": "host",
            "target": "host",
            "passes": {name.lower(): {"type": name, **settings} for name, settings in passes.items()},
            "output_dir": f"{scratch}/output",
            "cache_dir": f"{scratch}/cache",
        }
        found = _run(workflow | ({"data_configs": [data]} if data else {}), scratch, model, what)
        for name in REPORTS:
            (found / name).unlink(missing_ok=True)
        shutil.move(found, directory)


def _run(workflow: dict[str, Any], scratch: str, model: Path, what: str) -> Path:
    os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("CI", "true")  # the second switch: Olive sends a heartbeat before it looks at the first
    from olive.workflows import run as run_olive

    from slmops.quantize.model_builder import GenAIModelBuilder

    GenAIModelBuilder.failure = None
    said = io.StringIO()
    package = {"passes": {name: {"module_path": path} for name, path in PASSES.items()}}
    tempdir, disabled = tempfile.tempdir, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    failure: Exception | None = None
    output: Any = None
    try:
        with (
            heartbeat(f"building {what}", lambda: _last_line(said.getvalue()).partition(" in /")[0]),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            output = run_olive(workflow, package_config=package, tempdir=scratch)
    except Exception as error:  # Olive raises some errors of its passes and swallows others
        failure = error
    finally:
        logging.disable(disabled)
        tempfile.tempdir = tempdir  # Olive sets it for the whole process
    failure = GenAIModelBuilder.failure or failure
    if failure or not output.has_output_model():
        raise explain(failure or _last_line(said.getvalue()) or "it gave no reason", model, what) from failure
    found = Path(output.get_best_candidate().model_path)
    return found if found.is_dir() else found.parent


def explain(failure: Exception | str, model: Path, what: str) -> ModelError | DiskFullError:
    """What a failed pass means for the user."""
    text = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    if "No space left" in str(failure):
        return DiskFullError(f"no space left while building {what}; free some space and run it again")
    if isinstance(failure, NotImplementedError):
        architecture = models.read_config(model)["architectures"][0]
        return ModelError(
            f"the exporter does not know the architecture {architecture} of {model} ({text}); use a student of another "
            "family, such as Llama, Qwen, Phi, Gemma or SmolLM"
        )
    return ModelError(f"Olive could not build {what} of {model}: {text}")


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or [""])[-1]
