"""Variants for ONNX Runtime GenAI: built by Olive, by the passes that each algorithm takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from slmops import hardware, models, torch_models
from slmops.errors import ModelError
from slmops.progress import log
from slmops.quantize import awq, checkpoint, sensitivity
from slmops.quantize.adapters import accept_adapters
from slmops.quantize.calibration import olive_data
from slmops.quantize.job import Job
from slmops.quantize.logits import let_logits_begin
from slmops.quantize.olive_workflow import run_passes
from slmops.quantize.variants import Variant

Facts = dict[str, Any]

OLIVE_FORMAT = awq.KNOWN
"""Model types that onnxruntime-genai's builder reads in Olive's quantized format."""
FUSED = ("phi3",)
"""Those of them that keep several projections in one matrix."""

TRIAL_SHARE = 0.8
"""Of the drift budget, for what a trial in torch sees: the rest is for activations, which the runtime rounds too."""


def build(variant: Variant, job: Job, block_size: int, directory: Path) -> Facts:
    """Write `variant` of the job's model to `directory`; facts about how.

    Raises:
        ModelError: it cannot be built.
        DataError: the calibration rows are too few.
        DiskFullError: the device is full.
    """
    facts = BUILDERS[variant.algorithm](variant, job, block_size, directory)
    if not (directory / "genai_config.json").is_file():
        raise ModelError(f"Olive wrote no genai_config.json for {variant.name} of {job.model}; choose another variant")
    _compact(directory / "tokenizer.json")
    facts["num_weights_by_bits"] = weights_by_bits(directory)
    if variant.execution_provider == "cpu" and not let_logits_begin(directory):
        log.info("%s computes the logits of whole prompts: its head is not one that is known", variant.name)
    if job.config.accept_adapters and variant.execution_provider == "cpu":
        accept_adapters(directory)
        facts["accepts_adapters"] = True
    return facts


def _compact(file: Path) -> None:
    """Leave out the white space of a JSON file, which is half of a tokenizer's."""
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def weights_by_bits(directory: Path) -> dict[str, int]:
    """How many weights of a variant's matrix products are stored in so many bits, as its graph says."""
    found: dict[str, int] = {}
    for node in onnx.load(str(directory / "model.onnx"), load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            bits, rows, columns = (onnx.helper.get_node_attr_value(node, name) for name in ("bits", "N", "K"))
            found[str(bits)] = found.get(str(bits), 0) + rows * columns
    return found


def _plain(variant: Variant, job: Job, block_size: int, directory: Path) -> Facts:
    """The builder alone."""
    if variant.algorithm == "k_quant":
        _check_blocks(job, block_size, variant.name, even=True)
    settings = {
        "precision": variant.precision,
        "execution_provider": variant.execution_provider,
        "block_size": block_size,
        "algorithm": variant.algorithm if variant.algorithm == "k_quant" else "rtn",
        "head_bits": job.config.head_bits if variant.precision == "int4" else 4,
    }
    run_passes(job.model, {"GenAIModelBuilder": settings}, directory, variant.name)
    return {}


def _int8(variant: Variant, job: Job, block_size: int, directory: Path) -> Facts:
    """By Olive's Rtn, which lets a tied embedding share the head's 8 bits; the builder's own int8 does not."""
    if job.model_type not in OLIVE_FORMAT or not job.divides(block_size):
        log.info("%s: the embedding stays in float32, as Olive does not quantize this model in blocks", variant.name)
        settings = {"precision": "int8", "block_size": block_size}
        run_passes(job.model, {"GenAIModelBuilder": settings}, directory, variant.name)
        return {}
    rtn = {"bits": 8, "group_size": block_size, "sym": False, "lm_head": True}
    with job.scratch(f"int8-{block_size}") as quantized:
        run_passes(job.model, {"Rtn": rtn}, quantized, variant.name)
        _assemble(variant, job, quantized, block_size, directory)
    return {}


def _gptq(variant: Variant, job: Job, block_size: int, directory: Path) -> Facts:
    _assemble(variant, job, _gptq_checkpoint(variant, job, block_size), block_size, directory)
    return {}


def _awq(variant: Variant, job: Job, block_size: int, directory: Path) -> Facts:
    """Activation-aware scales, then Olive's Rtn, whose zero points serve the head best, which is not scaled."""
    awq.check_known(job.model_type)
    rtn = {"group_size": block_size, "sym": False, "lm_head": True, "overrides": _head(job)}
    scaled = _scaled_checkpoint(variant, job, block_size)
    with job.scratch(f"awq-{block_size}") as quantized:
        run_passes(scaled, {"Rtn": rtn}, quantized, variant.name)
        _assemble(variant, job, quantized, block_size, directory)
    return {}


def _mixed(variant: Variant, job: Job, block_size: int, directory: Path) -> Facts:
    """GPTQ, and 8 bits for the weights that move the output most, until the whole keeps within the budget."""
    quantized = _gptq_checkpoint(variant, job, block_size)
    scaled = _scaled_checkpoint(variant, job, block_size)
    model = torch_models.load_model(scaled, dtype=torch.float32, device=hardware.pick_device())
    trial = sensitivity.Trial(model, job.reference_rows)
    few_bits = checkpoint.dequantized(quantized)
    originals = {name: trial.modules[name].weight.data.cpu() for name in few_bits}
    more_bits = {name: checkpoint.rounded(weight, 8, block_size) for name, weight in originals.items()}
    choice = sensitivity.choose_raised(trial, few_bits, more_bits, job.config.drift_budget * TRIAL_SHARE)
    with job.scratch(f"mixed-{block_size}") as raised:
        shutil.copytree(quantized, raised)
        checkpoint.raise_bits(raised, originals, choice.raised)
        _assemble(variant, job, raised, block_size, directory)
    wanted = sum(originals[name].numel() for name in {*choice.raised, *_head(job)})
    stored = weights_by_bits(directory).get("8", 0)
    if wanted != stored:
        raise ModelError(f"{variant.name}: {wanted:,} weights were to be kept in 8 bits, and the graph has {stored:,}")
    return {
        "kept_in_int8": choice.raised,
        "estimated_drift_kl": round(choice.kl, 6),
        "estimated_drift_kl_all_int4": round(choice.plain_kl, 6),
    }


BUILDERS: Mapping[str, Callable[[Variant, Job, int, Path], Facts]] = {
    "rtn": _plain,
    "k_quant": _plain,
    "fp16": _plain,
    "int8": _int8,
    "gptq": _gptq,
    "awq": _awq,
    "mixed": _mixed,
}
"""How each algorithm builds a directory with blocks of one size."""


def _scaled_checkpoint(variant: Variant, job: Job, block_size: int) -> Path:
    """The model with activation-aware scales, in full precision: made once for all variants, kept until all are done.

    GPTQ takes it, too: it makes up for errors, and scales make them smaller. The guide on quantizing has figures.
    """
    _check_blocks(job, block_size, variant.name)
    path = job.work / f"scaled-{block_size}"
    if not path.is_dir():
        data = olive_data(job.calibration.fit, job.work / "calibration.safetensors")
        settings = {"group_size": block_size, "data_config": data["name"]}
        run_passes(job.model, {"ActivationAwareScale": settings}, path, variant.name, data)
    return path


def _gptq_checkpoint(variant: Variant, job: Job, block_size: int) -> Path:
    """The scaled model in Olive's format after GPTQ, made once for all variants and kept until the step is done."""
    _check_format(job, variant.name)
    scaled = _scaled_checkpoint(variant, job, block_size)
    path = job.work / f"gptq-{block_size}"
    if not path.is_dir():
        data = olive_data(job.calibration.fit, job.work / "calibration.safetensors")
        settings = {"group_size": block_size, "sym": False, "lm_head": True, "data_config": data["name"]}
        run_passes(scaled, {"Gptq": settings | {"overrides": _head(job)}}, path, variant.name, data)
    return path


def _head(job: Job) -> dict[str, dict[str, int]]:
    """What is set apart for the head."""
    return {sensitivity.HEAD: {"bits": 8}} if job.config.head_bits == 8 else {}


def _assemble(variant: Variant, job: Job, quantized: Path, block_size: int, directory: Path) -> None:
    """Have the builder make a directory of a checkpoint in Olive's format, which is left as it is."""
    with job.scratch(f"{variant.name}-checkpoint") as copy:
        shutil.copytree(quantized, copy)
        if job.model_type in FUSED:
            checkpoint.split_fused(copy)
        settings = {"precision": "int4", "block_size": block_size, "tied": job.tied}
        run_passes(copy, {"GenAIModelBuilder": settings}, directory, variant.name)


def _check_format(job: Job, name: str) -> None:
    if job.model_type not in OLIVE_FORMAT:
        architecture = models.read_config(job.model)["architectures"][0]
        raise ModelError(
            f"{name}: whether the exporter reads the architecture {architecture} after GPTQ is not known here (it is "
            f"for {', '.join(OLIVE_FORMAT)}); use cpu-int4 or cpu-int8"
        )


def _check_blocks(job: Job, block_size: int, name: str, *, even: bool = False) -> None:
    """
    Raises:
        ModelError: a width cannot be cut into whole blocks, as all but plain rounding needs.
    """
    unfit = sorted(width for width in job.widths if width % (block_size * (2 if even else 1)))
    if unfit:
        raise ModelError(
            f"{name}: blocks of {block_size} weights do not divide the model's widths {', '.join(map(str, unfit))}"
            + (" into an even number, as k_quant needs" if even else "")
            + "; choose a smaller block_size, or cpu-int4, which fills up the last block"
        )
