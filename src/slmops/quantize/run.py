"""quantize: one directory per variant, built for the runtime of its devices and run once before it counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slmops import artifacts, cpus, models
from slmops.artifacts import Sidecar
from slmops.device_classes import parse_device_classes
from slmops.errors import ConfigError, ModelError
from slmops.inference.executorch_files import is_executorch
from slmops.inference.runtime import Runtime, cannot_run, open_runtime
from slmops.packaging.foundry import write_inference_model
from slmops.progress import log
from slmops.quantize import genai_backend
from slmops.quantize.checkpoint import check_finite
from slmops.quantize.config import QuantizeConfig
from slmops.quantize.job import Job, read_model_config
from slmops.quantize.variants import EXECUTORCH, GENAI, VARIANTS, Variant, by_class
from slmops.resume import work_dir

STEP = "quantize"

Facts = dict[str, Any]


def _build_executorch(variant: Variant, job: Job, block_size: int, directory: Path) -> Facts:
    from slmops.quantize import executorch_backend  # its packages are not in every image

    executorch_backend.build(
        job.model,
        directory,
        precision="int4" if variant.precision == "int4" else "int8",
        context_length=job.config.context_length,
        block_size=block_size,
    )
    return {}


BACKENDS: Mapping[str, Callable[[Variant, Job, int, Path], Facts]] = {
    GENAI: genai_backend.build,
    EXECUTORCH: _build_executorch,
}
"""What writes a variant of each backend to a directory."""


def run(config: QuantizeConfig, *, model: Path, variants: Path, calibration: Path | None = None) -> Sidecar:
    """Build each of `config.variants` of `model`, one directory each.

    A killed or failed run keeps the variants that it finished for the next one with the same settings and inputs.

    Args:
        config: what to build, and how.
        model: a Hugging Face directory.
        variants: the artifact to write.
        calibration: chat records of the task, for variants that are calibrated and for measuring drift.

    Raises:
        ArtifactError: an input is missing or half-written.
        ConfigError: the settings need calibration rows, and none are given.
        ModelError: the model is quantized already or of no known architecture, or has weights that are not finite; or
            variants cannot be built or do not run; with all of them, after the others were built.
        DataError: the calibration rows are too few.
        DiskFullError: the device is full.
    """
    parents = [models.open_model(model)]
    if calibration:
        parents.append(artifacts.expect(calibration, "chat_dataset", "responses"))
    _check_inputs(config, model, calibration)
    check_finite(model)
    unfinished = work_dir(STEP, _without_choice(config), parents, variants)
    job = Job(config, model, calibration, unfinished)
    if calibration:
        _ = job.calibration  # too few rows are said before anything is built
    with artifacts.writing(variants, kind="variants", step=STEP, config=config, parents=parents) as draft:
        built = _build_all(config, job)
        for name in built:
            shutil.move(unfinished / name, draft.path / name)
        draft.facts["variants"] = built
        if config.device_classes:
            classes = parse_device_classes(config.device_classes, "device_classes")
            draft.facts["classes"] = by_class(config.variants, classes)
    shutil.rmtree(unfinished, ignore_errors=True)
    return draft.sidecar


def _without_choice(config: QuantizeConfig) -> QuantizeConfig:
    """The settings that all variants share: a variant that is done stays so when others are asked for."""
    return config.model_copy(update={"variants": [], "device_classes": {}})


def _check_inputs(config: QuantizeConfig, model: Path, calibration: Path | None) -> None:
    if method := models.read_config(model).get("quantization_config"):
        raise ModelError(
            f"{model} holds quantized weights ({method.get('quant_method', 'by a method without a name')}), which "
            "would be rounded twice; give the model as it was before it was quantized"
        )
    read_model_config(model)  # an architecture that nothing here knows is said before anything is built
    if calibration:
        return
    if needy := [name for name in config.variants if VARIANTS[name].calibrated]:
        raise ConfigError(
            f"{', '.join(needy)} need calibration rows; give chat records of the task as `calibration`, or leave these "
            "variants out"
        )
    if len(config.block_sizes) > 1:
        raise ConfigError("block_sizes are chosen by drift on calibration rows; give `calibration`, or one block_size")


def _build_all(config: QuantizeConfig, job: Job) -> dict[str, Facts]:
    """Every variant below `job.work`, with its facts.

    Raises:
        ModelError: some could not be built; raised at the end.
    """
    built: dict[str, Facts] = {}
    failures: dict[str, ModelError] = {}
    for name in config.variants:
        try:
            built[name] = _finished(name, job) or _build(VARIANTS[name], job)
        except ModelError as error:
            log.warning("%s failed: %s", name, error)
            failures[name] = error
    if len(failures) == 1:
        raise next(iter(failures.values()))
    if failures:
        lines = "".join(f"\n  {name}: {error}" for name, error in failures.items())
        raise ModelError(f"{len(failures)} of {len(config.variants)} variants cannot be built:{lines}")
    return built


def _finished(name: str, job: Job) -> Facts | None:
    """The facts of a variant that an earlier run built, if its files are as they were."""
    try:
        facts: Facts = json.loads((job.work / f"{name}.json").read_text())
    except (FileNotFoundError, ValueError):  # never written, or cut short by a kill
        return None
    if artifacts.digest_of(list(artifacts.list_files(job.work / name))) != facts["digest"]:
        return None
    log.info("%s was built by an earlier run", name)
    return facts


def _build(variant: Variant, job: Job) -> Facts:
    """Build a variant in the block size that suits it, see that it runs, and write down its facts last."""
    directory = job.work / variant.name
    log.info("building %s (%s)", variant.name, variant.algorithm)
    facts = _choose_block_size(variant, job, directory)
    facts |= {
        "digest": artifacts.digest_of(list(artifacts.list_files(directory))),
        "backend": variant.backend,
        "execution_provider": variant.execution_provider,
        "precision": variant.precision,
        "algorithm": variant.algorithm,
    }
    drift = f", KL {facts['drift_kl']:.4f}" if "drift_kl" in facts else ""
    log.info("%s has %.1f MB, blocks of %d%s", variant.name, facts["size_bytes"] / 1e6, facts["block_size"], drift)
    artifacts.write_json(job.work / f"{variant.name}.json", facts)
    return facts


def _choose_block_size(variant: Variant, job: Job, directory: Path) -> Facts:
    """Try block sizes from the largest down: the smallest directory within the drift budget, else the least drift.

    Larger blocks are smaller on disk, so the first within the budget is taken; but not for `mixed`, which pays for them
    with more weights in 8 bits. What cannot run here has no drift to choose by, and gets the smallest, the most exact.
    """
    sizes = sorted(set(job.config.block_sizes) or {job.config.block_size}, reverse=True)
    if not variant.in_blocks or cannot_run(variant.execution_provider):
        sizes = sizes[-1:]
    budget, tried = job.config.drift_budget, list[Facts]()
    best: Facts | None = None
    failures: list[ModelError] = []
    for block_size in sizes:
        with job.scratch(variant.name) as trial:
            try:
                facts = {"block_size": block_size} | _build_once(variant, job, block_size, trial)
            except ModelError as error:
                failures.append(error)
                log.info("%s with blocks of %d: %s", variant.name, block_size, error)
                continue
            tried.append({key: facts[key] for key in ("block_size", "size_bytes", "drift_kl") if key in facts})
            if best is None or _rank(facts, budget) < _rank(best, budget):
                shutil.rmtree(directory, ignore_errors=True)
                shutil.move(trial, directory)
                best = facts
        if facts.get("drift_kl", 0) <= budget and variant.algorithm != "mixed":
            break
    if best is None:
        raise failures[-1]
    return best | ({"tried": tried} if len(sizes) > 1 else {})


def _rank(facts: Facts, budget: float) -> tuple[bool, float]:
    """Less is better: within the budget by size, outside by drift."""
    drift: float = facts.get("drift_kl", 0.0)
    return (True, drift) if drift > budget else (False, float(facts["size_bytes"]))


def _build_once(variant: Variant, job: Job, block_size: int, directory: Path) -> Facts:
    facts = BACKENDS[variant.backend](variant, job, block_size, directory)
    if variant.backend == GENAI:
        write_inference_model(directory, f"{job.config.model_name}-{variant.name}")
    facts["size_bytes"] = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    if reason := cannot_run(variant.execution_provider):
        return facts | {"ran": False, "not_run": reason}
    check_runs(directory)
    facts["ran"] = True
    if job.data:
        drift = job.drift(directory)
        facts |= {"drift_kl": round(drift.kl, 6), "drift_top1_agreement": round(drift.top1_agreement, 6)}
    return facts


def check_runs(directory: Path) -> None:
    """Load a variant as an edge node does, and as others do by the runtime's own package, and have it answer.

    Raises:
        ModelError: it cannot be loaded, or does not run.
    """
    num_threads = cpus.count()
    _see_answer(open_runtime(directory, quantized=True, dtype="auto", num_threads=num_threads), directory)
    if not is_executorch(directory):
        from slmops.inference.genai import GenAIRuntime  # its package is not in every image

        _see_answer(GenAIRuntime(directory, num_threads=num_threads), directory)


def _see_answer(runtime: Runtime, directory: Path) -> None:
    try:
        runtime.answer([[{"role": "user", "content": "hello"}]], max_new_tokens=4)
    except Exception as error:  # what the runtime raises is not documented
        raise ModelError(
            f"{directory} loads but does not run in {runtime.name}: {error}; choose another variant or block_size"
        ) from error
