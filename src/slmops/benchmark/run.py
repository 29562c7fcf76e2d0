"""benchmark: latency, speed, memory and size of one model, measured in a process of its own under a device's limits."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.benchmark.config import BenchmarkConfig
from slmops.errors import ModelError
from slmops.inference.runtime import cannot_run
from slmops.measuring.process import Died, Outcome, Task, measure, run_worker
from slmops.progress import log
from slmops.records import ChatRecord, read_records
from slmops.variants import ModelFiles, find_model

STEP = "benchmark"
FIGURES = "figures.json"
"""All facts: what says otherwise has another digest."""
GENAI = "onnxruntime-genai"
"""The backend whose variants are measured by prompt length and number of streams, too."""

Measure = Callable[[ModelFiles, Task], Outcome]
"""Where a model is measured: here, or on another machine."""


def measure_here(files: ModelFiles, task: Task) -> Outcome:
    """Measure in a process on this machine, and for a variant of ONNX Runtime GenAI the floor of its memory."""
    if reason := cannot_run(files.execution_provider):
        return Outcome({"status": "not_run", "reason": reason})
    outcome = measure(files.directory, task)
    if task.by_token and "peak_rss_bytes" in outcome.facts:
        outcome.facts["runtime_floor_bytes"] = _floor(files.directory, task)
    return outcome


def run(
    config: BenchmarkConfig, *, model: Path, prompts: Path, benchmark: Path, measure: Measure = measure_here
) -> Sidecar:
    """Answer prompts and measure each; for a variant also by prompt length and number of streams, some times over.

    Under a device class, what a variant fails at is a result, and so is a machine that is no such device:
    facts["status"] is `measured`, `failed` or `not_run`.

    Args:
        config: settings.
        model: a Hugging Face directory or the output of quantize.
        prompts: chat records, whose prompts are sent.
        benchmark: where the figures go.
        measure: what measures a model.

    Raises:
        ArtifactError: an input is missing or half-written.
        ModelError: without a device class, the model cannot be loaded, or the measured process died.
    """
    files = find_model(model, config.variant)
    parents = [files.sidecar, artifacts.expect(prompts, "chat_dataset")]
    with artifacts.writing(benchmark, kind="benchmark", step=STEP, config=config, parents=parents) as draft:
        task = make_task(config, files, read_records(prompts))
        reason = _built_for_another(files, task)
        outcome = Outcome({"status": "not_run", "reason": reason}) if reason else measure(files, task)
        (draft.path / "requests.json").write_text(json.dumps(outcome.requests, indent=1) + "\n")
        draft.facts |= outcome.facts | {
            "variant": files.variant,
            "model_digest": files.digest,
            "size_bytes": files.size_bytes,
            "device_class": config.device_class,
        }
        artifacts.write_json(draft.path / FIGURES, draft.facts)
    _report(draft.sidecar)
    return draft.sidecar


def make_task(config: BenchmarkConfig, files: ModelFiles, records: Sequence[ChatRecord]) -> Task:
    """What to measure: the first prompts, again from the start where there are too few."""
    wanted = config.num_warmup + config.num_requests
    prompts = [records[number % len(records)].prompt for number in range(wanted)]
    known = files.sidecar.facts["variants"][files.variant] if files.quantized else {}
    return Task(
        quantized=files.quantized,
        by_token=files.quantized and known.get("backend", GENAI) == GENAI,
        dtype=config.dtype,
        num_threads=config.num_threads,
        max_new_tokens=config.max_new_tokens,
        warmup_prompts=prompts[: config.num_warmup],
        prompts=prompts[config.num_warmup :],
        prompt_lengths=config.prompt_lengths,
        streams=config.streams,
        num_repeats=config.num_repeats if files.quantized else 1,
        noise_threshold=config.noise_threshold,
        device_class=config.find_device_class(),
    )


def _built_for_another(files: ModelFiles, task: Task) -> str | None:
    """Why a device cannot run a variant, whatever machine stands for it; None if it can."""
    if task.device_class is None or files.execution_provider in {"cpu", task.device_class.execution_provider}:
        return None
    return f"it is built for {files.execution_provider}, the device has {task.device_class.execution_provider}"


def _floor(directory: Path, task: Task) -> int:
    """Peak memory of the same process around a model without weights."""
    from slmops.benchmark.floor import write_empty_model

    task = task.model_copy(
        update={
            "by_token": False,
            "warmup_prompts": [],
            "prompts": [[{"role": "user", "content": "hello"}]],
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch) / "empty"
        write_empty_model(directory, empty)
        try:
            return int(run_worker(empty, task, None, None)["peak_rss_bytes"])
        except Died as death:
            raise ModelError(f"the process that measured the memory of the runtime alone {death}") from None


def _report(sidecar: Sidecar) -> None:
    facts = sidecar.facts
    where = f" for {facts['device_class']}" if facts["device_class"] else ""
    if facts["status"] != "measured":
        log.info("%s%s: %s: %s", facts["variant"], where, facts["status"], facts["reason"])
        return
    log.info("%s%s: p50 %.0f ms, %.0f tokens/s, peak %.0f MB", *(
        facts["variant"], where, facts["latency_ms_p50"], facts["tokens_per_s"], facts["peak_rss_bytes"] / 1e6
    ))  # fmt: skip
    if facts.get("noisy"):
        log.warning("noisy: %s differ between repeats; give the machine to one run", ", ".join(facts["noisy_figures"]))
