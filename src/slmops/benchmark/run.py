"""benchmark: latency, speed, memory and size of one model on this machine, measured in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops import artifacts
from slmops.artifacts import Sidecar
from slmops.benchmark.config import BenchmarkConfig
from slmops.errors import ModelError
from slmops.progress import Progress, log
from slmops.records import ChatRecord, read_records
from slmops.variants import ModelFiles, find_model

STEP = "benchmark"


def run(config: BenchmarkConfig, *, model: Path, prompts: Path, benchmark: Path) -> Sidecar:
    """Answer prompts one after the other and measure each.

    Raises:
        ArtifactError: an input is missing or half-written.
        ModelError: the model cannot be loaded, or the measured process died.
    """
    files = find_model(model, config.variant)
    parents = [files.sidecar, artifacts.expect(prompts, "chat_dataset")]
    with artifacts.writing(benchmark, kind="benchmark", step=STEP, config=config, parents=parents) as draft:
        measured = _measure(files, read_records(prompts), config)
        (draft.path / "requests.json").write_text(json.dumps(measured["requests"], indent=1) + "\n")
        draft.facts |= summarize(measured["requests"]) | {
            "variant": files.variant,
            "model_digest": files.digest,
            "size_bytes": files.size_bytes,
            "runtime": measured["runtime"],
            "load_s": round(measured["load_s"], 3),
            "num_threads": config.num_threads,
            "peak_rss_bytes": measured["peak_rss_bytes"],
            "cpu": cpu_name(),
        }
        if files.quantized:  # transformers has no model without weights to measure a floor with
            draft.facts["runtime_floor_bytes"] = _floor(files, config)
    facts = draft.facts
    log.info("p50 %.0f ms, %.0f tokens/s, peak %.0f MB", *(
        facts["latency_ms_p50"], facts["tokens_per_s"], facts["peak_rss_bytes"] / 1e6
    ))  # fmt: skip
    return draft.sidecar


def _measure(files: ModelFiles, records: Sequence[ChatRecord], config: BenchmarkConfig) -> dict[str, Any]:
    """Run the worker on the first prompts, again from the start where there are too few."""
    wanted = config.num_warmup + config.num_requests
    prompts = [records[number % len(records)].prompt for number in range(wanted)]
    return _run_worker(
        files.directory,
        quantized=files.quantized,
        config=config,
        warmup_prompts=prompts[: config.num_warmup],
        prompts=prompts[config.num_warmup :],
    )


def _floor(files: ModelFiles, config: BenchmarkConfig) -> int:
    """Peak memory of the same process around a model without weights."""
    from slmops.benchmark.floor import write_empty_model

    prompt = [{"role": "user", "content": "hello"}]
    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch) / "empty"
        write_empty_model(files.directory, empty)
        measured = _run_worker(empty, quantized=True, config=config, warmup_prompts=[], prompts=[prompt])
    return int(measured["peak_rss_bytes"])


def _run_worker(directory: Path, *, quantized: bool, config: BenchmarkConfig, **work: Any) -> dict[str, Any]:
    """Start the worker, follow it, and return its last line.

    Raises:
        ModelError: it ended without one.
    """
    task = {
        "directory": str(directory.resolve()),
        "quantized": quantized,
        "dtype": config.dtype,
        "num_threads": config.num_threads,
        "max_new_tokens": config.max_new_tokens,
        **work,
    }
    environment = os.environ | {"OMP_NUM_THREADS": str(config.num_threads)}
    line = ""
    # The task in a file: a pipe would break under a worker that dies before it has read it.
    with tempfile.TemporaryFile("w+") as task_file, tempfile.TemporaryFile("w+") as errors:
        json.dump(task, task_file)
        task_file.seek(0)
        with (
            subprocess.Popen(
                [sys.executable, "-m", "slmops.benchmark.worker"],
                stdin=task_file,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            ) as worker,
            Progress(f"{STEP} requests", len(work["prompts"]), "requests") as progress,
        ):
            if worker.stdout is None:
                raise RuntimeError("the worker has no pipe")
            for line in worker.stdout:
                if '"done"' in line:
                    progress.advance()
            if worker.wait() != 0:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["no message"])[-1]
                raise ModelError(f"the process that measured {directory} ended with code {worker.returncode}: {last}")
    result: dict[str, Any] = json.loads(line)
    return result


def summarize(requests: Sequence[dict[str, float]]) -> dict[str, float]:
    """Percentiles in milliseconds, and tokens per second of decoding (from the first token to the last)."""
    first = [request["first_s"] * 1000 for request in requests]
    total = [request["total_s"] * 1000 for request in requests]
    decoded = sum(max(request["num_tokens"] - 1, 0) for request in requests)
    decoding_s = sum(request["total_s"] - request["first_s"] for request in requests)
    return {
        "num_requests": len(requests),
        "time_to_first_token_ms_p50": round(percentile(first, 50), 2),
        "time_to_first_token_ms_p95": round(percentile(first, 95), 2),
        "latency_ms_p50": round(percentile(total, 50), 2),
        "latency_ms_p95": round(percentile(total, 95), 2),
        "tokens_per_s": round(decoded / decoding_s, 1) if decoding_s > 0 else 0.0,
        "output_tokens_mean": round(sum(request["num_tokens"] for request in requests) / len(requests), 1),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default (Hyndman and Fan 1996, type 7)."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def cpu_name() -> str:
    """Model of the processor, as the kernel tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
