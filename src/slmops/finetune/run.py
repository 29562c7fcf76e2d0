"""finetune: teach a base model to answer as the assistant's turns of a data set do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from slmops import artifacts, hardware, models, torch_models
from slmops.artifacts import Sidecar
from slmops.errors import ModelError
from slmops.finetune.config import FinetuneConfig
from slmops.progress import log
from slmops.records import read_records
from slmops.resume import work_dir
from slmops.training import loop
from slmops.training.batches import encode_rows
from slmops.training.checkpoints import Checkpoints
from slmops.training.curves import Curves
from slmops.training.generating import make_metric
from slmops.training.head import loss_on_labels

STEP = "finetune"


def run(config: FinetuneConfig, *, train: Path, validation: Path, base: Path, model: Path) -> Sidecar:
    """Fine-tune `base` on chat records or a teacher's responses, and write it whole, adapters merged, to `model`.

    A killed run goes on from its last checkpoint when it is started again with the same settings and inputs.

    Raises:
        ArtifactError: an input is missing or half-written.
        ModelError: the base cannot be trained: unknown architecture, no chat template, a loss that is not finite.
        DataError: no row is short enough.
    """
    parents = _open(train, validation, base)
    unfinished = work_dir(STEP, config, parents, model)
    with artifacts.writing(model, kind="hf_model", step=STEP, config=config, parents=parents) as draft:
        trained = _train(config, train, validation, base, unfinished)
        result = _merge(trained.adapted, base, unfinished) if trained.adapted else trained.model
        torch_models.save_model(result, trained.tokenizer, draft.path)
        draft.facts |= trained.curves.facts() | trained.ran_on
        draft.facts |= {
            "method": config.method,
            "num_parameters": torch_models.num_parameters(result),
            "tokenizer_digest": models.tokenizer_digest(draft.path),
        }
    Checkpoints(unfinished, config.checkpoint_uri).remove()
    return draft.sidecar


def take_part(config: FinetuneConfig, *, train: Path, validation: Path, base: Path, model: Path) -> None:
    """What the processes of a training but the first do: compute their share of `run`, and write nothing."""
    _train(config, train, validation, base, work_dir(STEP, config, _open(train, validation, base), model))


@dataclass
class _Trained:
    model: PreTrainedModel
    adapted: PeftModel | None
    tokenizer: PreTrainedTokenizerBase
    curves: Curves
    ran_on: dict[str, object]


def _open(train: Path, validation: Path, base: Path) -> list[Sidecar]:
    return [
        artifacts.expect(train, "chat_dataset", "responses"),
        artifacts.expect(validation, "chat_dataset"),
        models.open_model(base),
    ]


def _train(config: FinetuneConfig, train: Path, validation: Path, base: Path, unfinished: Path) -> _Trained:
    hardware.use_huge_pages()
    hardware.use_all_cores()
    torch.manual_seed(config.seed)
    device = hardware.pick_device()
    dtype = hardware.pick_dtype(config.dtype, device)
    tokenizer = torch_models.load_tokenizer(base)
    # Of a teacher's responses only the last turn is the teacher's.
    last_turn_only = artifacts.read(train).kind == "responses"
    rows = encode_rows(tokenizer, read_records(train), config.max_length, last_turn_only=last_turn_only)
    held_out = read_records(validation)
    validation_rows = encode_rows(tokenizer, held_out, config.max_length)
    trainable = _load_base(base, config, dtype, device)
    adapted = _add_adapters(trainable, config) if config.method != "full" else None
    log.info("%s of %d rows on %s", config.method, len(rows), hardware.describe(device, dtype))
    task = loop.Task(
        model=trainable,
        loss=loss_on_labels,
        metric=make_metric(trainable, tokenizer, held_out, config),
        rows=rows,
        validation_rows=validation_rows,
        config=config,
        compute_dtype=dtype,
        pad_token_id=tokenizer.pad_token_id,
        work_dir=unfinished,
    )
    curves = loop.train(task, STEP)
    return _Trained(task.model, adapted, tokenizer, curves, loop.where(device, dtype))


def _load_base(base: Path, config: FinetuneConfig, compute_dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Weights that will be trained stay in float32; frozen ones take the compute type, or 4 bits."""
    if config.method == "full":
        return torch_models.load_model(base, dtype=torch.float32, device=device)
    if config.method == "lora":
        return torch_models.load_model(base, dtype=compute_dtype, device=device)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    model = torch_models.load_model(
        base, dtype=compute_dtype, device=device, quantization_config=four_bits, device_map={"": device}
    )
    for module in model.modules():
        # Else bitsandbytes packs the weights for inference at the first evaluation on a CPU with AVX512-BF16, and
        # lets no gradient through them from then on, without an error.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def _add_adapters(model: PreTrainedModel, config: FinetuneConfig) -> PeftModel:
    """Low-rank adapters on every linear layer but the head (Hu et al. 2021, arXiv:2106.09685), put into `model` itself.

    Over a 4-bit base this is QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

    Raises:
        ModelError: the architecture has no layer that can carry them.
    """
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
    )
    try:
        with torch_models.quiet_libraries():
            return get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"{type(model).__name__} cannot carry adapters ({error}); use method=full") from error


def _merge(adapted: PeftModel, base: Path, unfinished: Path) -> PreTrainedModel:
    """Merge the adapters into the base in full precision, since a base in 4 bits or bfloat16 would round them away."""
    adapter = unfinished / "adapter"
    adapted.save_pretrained(str(adapter))
    whole = torch_models.load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    stored_dtype = torch_models.stored_dtype(base)
    with torch_models.quiet_libraries():
        merged: PreTrainedModel = PeftModel.from_pretrained(whole, adapter).merge_and_unload()
    return torch_models.cast(merged, stored_dtype)
