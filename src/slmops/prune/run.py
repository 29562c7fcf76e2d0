"""prune: a smaller model out of a larger one, by layers, width, zeros among the weights, and vocabulary."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slmops import artifacts, hardware, models, torch_models
from slmops.artifacts import Sidecar
from slmops.errors import ConfigError, ModelError
from slmops.progress import heartbeat, log, track
from slmops.prune.config import PruneConfig
from slmops.records import ChatRecord, read_records
from slmops.shaping import embedding
from slmops.shaping.plan import StudentPlan, check_plan
from slmops.shaping.sparsity import sparsify, zero_fraction
from slmops.shaping.student import shape_student
from slmops.shaping.vocabulary import check_byte_level, choose_vocabulary, shrink_tokenizer
from slmops.training.batches import Batch, batches_by_length, encode, encode_rows

STEP = "prune"
NUM_COMPARED_ROWS = 4
"""Calibration rows on which logits are compared before and after tokens go."""


def run(config: PruneConfig, *, model: Path, calibration: Path, pruned: Path) -> Sidecar:
    """Write to `pruned` what `config` leaves of `model`.

    First layers and width, then zeros, then the vocabulary. Nothing is trained: distill heals what was cut, and cutting
    the vocabulary needs no healing.

    Raises:
        ArtifactError: an input is missing or half-written.
        ConfigError: settings contradict each other or the model, or ask for nothing.
        ModelError: the model cannot be cut so, or its weights are not finite.
        DataError: no calibration row is short enough.
    """
    parents = [models.open_model(model), artifacts.expect(calibration, "chat_dataset", "responses")]
    _check(config, model)
    with artifacts.writing(pruned, kind="hf_model", step=STEP, config=config, parents=parents) as draft:
        draft.facts |= _prune(config, model, calibration, draft.path)
        draft.facts["tokenizer_digest"] = models.tokenizer_digest(draft.path)
    return draft.sidecar


def _plan(config: PruneConfig) -> StudentPlan:
    return StudentPlan(shape=config.shape, layer_rule=config.layer_rule, keep_layers=config.keep_layers)


def _check(config: PruneConfig, model: Path) -> None:
    """Check all that can be checked before the model is loaded."""
    if not config.cuts:
        raise ConfigError("nothing is to be pruned; set shape, keep_layers, sparsity or vocabulary, or leave prune out")
    known = models.read_config(model)
    check_plan(_plan(config), known)
    if known.get("quantization_config"):
        raise ModelError(f"{model} holds quantized weights, which cannot be pruned; use the model before quantization")
    if config.vocabulary == "domain":
        check_byte_level(json.loads((model / "tokenizer.json").read_text(encoding="utf-8")))


def _prune(config: PruneConfig, source: Path, calibration: Path, output: Path) -> dict[str, object]:
    """Write the pruned model to `output`, and give the facts."""
    hardware.use_all_cores()
    device = hardware.pick_device()
    tokenizer, records = torch_models.load_tokenizer(source), read_records(calibration)
    model = torch_models.load_model(source, dtype=torch.float32, device=device)
    _check_finite(model, source)
    facts: dict[str, object] = {
        "num_parameters_before": torch_models.num_parameters(model),
        "vocab_size_before": embedding.vocab_size(model),
    }

    def batches() -> Iterable[Batch]:
        rows = encode_rows(tokenizer, records[: config.max_calibration_rows], config.max_length)
        return batches_by_length(rows, config.micro_batch_size, tokenizer.pad_token_id, device)

    with heartbeat("choosing layers and width", str):
        model, shape = shape_student(model, _plan(config), batches, seed=0)
    facts |= {name: value for name, value in shape.items() if name != "student_weights"}
    if config.sparsity != "none":
        sparsify(model, batches(), config.sparsity, config.sparsity_fraction)
        facts["zero_fraction"] = round(zero_fraction(model), 6)
    if config.vocabulary == "domain":
        tokenizer, chosen = _keep_domain(config, model, tokenizer, records)
        facts |= chosen
    facts |= {"num_parameters": torch_models.num_parameters(model), "vocab_size": embedding.vocab_size(model)}
    log.info(
        "%s of %s parameters stay, and %s of %s tokens",
        *(
            f"{facts[name]:,}"
            for name in ("num_parameters", "num_parameters_before", "vocab_size", "vocab_size_before")
        ),
    )
    torch_models.save_model(torch_models.cast(model, torch_models.stored_dtype(source)), tokenizer, output)
    return facts


def _check_finite(model: PreTrainedModel, source: Path) -> None:
    """
    Raises:
        ModelError: a weight is no finite number, so that nothing measured on the model means anything.
    """
    for name, weight in model.named_parameters():
        if count := int((~weight.isfinite()).sum()):
            raise ModelError(
                f"{source}: {count} of the weights {name} are NaN or infinite; use a checkpoint from before "
                "the training went wrong"
            )


def _keep_domain(
    config: PruneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[ChatRecord]
) -> tuple[PreTrainedTokenizerBase, dict[str, object]]:
    """Cut the vocabulary of `model`, in place, to that of `records`; the tokenizer of what stays, and facts.

    Raises:
        ModelError: the tokenizer or the architecture turned out to do more with tokens than is known here.
    """
    texts = [
        text for record in track(records, "reading the vocabulary", len(records)) for text in _texts(tokenizer, record)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        file = Path(scratch, "tokenizer.json")
        whole = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = choose_vocabulary(
            whole,
            {number for text in texts for number in text},
            always=embedding.ids_in_config(model),
            num_rows=embedding.num_rows(model),
            min_size=config.min_vocab_size,
            multiple=config.vocab_multiple,
        )
        file.write_text(json.dumps(shrink_tokenizer(whole, vocabulary.ids), ensure_ascii=False), encoding="utf-8")
        smaller = torch_models.load_tokenizer(Path(scratch))
    place = {number: at for at, number in enumerate(vocabulary.ids)}
    cut = [[place[number] for number in text] for text in texts]
    again = (text for record in track(records, "reading it again", len(records)) for text in _texts(smaller, record))
    if different := sum(ours != theirs for ours, theirs in zip(cut, again, strict=True)):
        raise ModelError(
            f"without the tokens that are unused, the tokenizer cuts {different} of {len(cut)} texts of the "
            "calibration rows otherwise than before; set vocabulary=kept"
        )
    compared = range(min(NUM_COMPARED_ROWS, len(texts)))
    before = [embedding.logits_of(model, texts[row][: config.max_length])[:, vocabulary.ids] for row in compared]
    embedding.keep_rows(model, vocabulary.ids)
    after = [embedding.logits_of(model, cut[row][: config.max_length]) for row in compared]
    return smaller, {
        "num_domain_tokens": vocabulary.num_used,
        "num_required_tokens": vocabulary.num_required,
        "num_filled_tokens": vocabulary.num_filled,
        "max_logit_difference": max(map(embedding.check_same_logits, before, after)),
    }


def _texts(tokenizer: PreTrainedTokenizerBase, record: ChatRecord) -> Iterator[list[int]]:
    """The texts that a training makes of a row: the whole, and the prompt up to each answer."""
    messages = [message.model_dump() for message in record.messages]
    yield encode(tokenizer, messages, to_answer=False)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            yield encode(tokenizer, messages[:number], to_answer=True)
