"""generate_responses: a teacher answers the prompts of a data set."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from slmops import artifacts, hardware, models, torch_models
from slmops.artifacts import Draft, Sidecar
from slmops.cached_logits import CachedLogitsWriter, LogitsInfo, record_dtype
from slmops.errors import ConfigError
from slmops.generate_responses import endpoint
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.progress import Progress, log
from slmops.records import ROWS, ChatRecord, Message, read_records, write_jsonl
from slmops.resume import work_dir
from slmops.training.batches import encode, encode_row, pad_left

STEP = "generate_responses"


def run(config: GenerateResponsesConfig, *, prompts: Path, teacher: Path | None, responses: Path) -> Sidecar:
    """Answer each prompt once, by the model in `teacher` or by the endpoint of `config`.

    Finished answers survive a kill, and are not asked again.

    Answers that are cut off by `max_new_tokens`, and those whose text does not turn into the same tokens again, are
    left out and counted: a student could not learn from them what the teacher meant.

    Raises:
        ArtifactError: an input is missing or half-written.
        ModelError: the teacher cannot be loaded.
        DataError: no answer is left.
        ConfigError: there is neither a teacher nor an endpoint.
        UserError, TransientError: the endpoint refuses, or does not answer.
    """
    if config.teacher_kind == "endpoint":
        return endpoint.run(config, prompts=prompts, responses=responses)
    if teacher is None:
        raise ConfigError("teacher_kind=model needs a teacher; give one, or use teacher_kind=endpoint")
    parents = [artifacts.expect(prompts, "chat_dataset"), models.open_model(teacher)]
    unfinished = work_dir(STEP, config, parents, responses)
    with artifacts.writing(responses, kind="responses", step=STEP, config=config, parents=parents) as draft:
        hardware.use_all_cores()
        device = hardware.pick_device()
        dtype = hardware.pick_dtype(config.dtype, device)
        tokenizer = torch_models.load_tokenizer(teacher)
        model = torch_models.load_model(teacher, dtype=dtype, device=device)
        records = read_records(prompts)[: config.max_rows]
        log.info("%d prompts on %s", len(records), hardware.describe(device, dtype))
        started = time.monotonic()
        answers = _answer_all(model, tokenizer, records, config, unfinished)
        seconds = time.monotonic() - started
        _write(draft, config, tokenizer, records, answers, parents[1], teacher)
        num_tokens = sum(len(answer.ids) for answer in answers)
        draft.facts |= {
            "num_tokens": num_tokens,
            "tokens_per_s": round(num_tokens / seconds, 1),
            "tokenizer_digest": models.tokenizer_digest(teacher),
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
        }
    shutil.rmtree(unfinished)
    return draft.sidecar


@dataclass(frozen=True)
class Answer:
    """One answer of n tokens, the end-of-turn token included; k is 0 if no logits are kept."""

    ids: list[int]
    top_ids: np.ndarray
    """[n, k] int32."""
    top_log_probs: np.ndarray
    """[n, k] float16."""
    tail_log_prob: np.ndarray
    """[n] float32."""


class TopK(LogitsProcessor):
    """Notes the likeliest tokens of each step before the next token is chosen; changes nothing."""

    def __init__(self, k: int, temperature: float) -> None:
        self.k, self.temperature = k, temperature
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scaled = scores.float() / self.temperature
        top, ids = scaled.topk(self.k, dim=-1)
        log_probs = top - scaled.logsumexp(-1, keepdim=True)
        # What the top leaves of 1 is off by 1e-6 or so, and saves two more passes over the vocabulary.
        tail = (-torch.expm1(log_probs.logsumexp(-1))).clamp_min(0).log()
        self.steps.append((ids.int().cpu(), log_probs.half().cpu(), tail.cpu()))
        return scores


def _answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[ChatRecord],
    config: GenerateResponsesConfig,
    unfinished: Path,
) -> list[Answer]:
    """Answers in the order of `records`, computed in batches of similar length."""
    encoded = [encode(tokenizer, record.prompt, to_answer=True) for record in records]
    order = sorted(range(len(records)), key=lambda index: len(encoded[index]))
    answers: dict[int, Answer] = {}
    with Progress(STEP, len(records)) as progress:
        for start in range(0, len(order), config.batch_size):
            indices = order[start : start + config.batch_size]
            path = unfinished / f"batch-{start:08d}.npz"
            if not path.exists():
                torch.manual_seed(config.seed + start)
                _store(path, answer_batch(model, tokenizer, [encoded[index] for index in indices], config))
            answers |= dict(zip(indices, _restore(path), strict=True))
            progress.advance(len(indices))
    return [answers[index] for index in range(len(records))]


@torch.inference_mode()
def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    config: GenerateResponsesConfig,
) -> list[Answer]:
    """Answer prompts together, padded on the left."""
    inputs = pad_left(prompts, tokenizer.pad_token_id, model.device)
    top_k = TopK(config.logits_top_k, config.logits_temperature)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if config.decoding == "sample":
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    output = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([top_k] if config.logits_top_k else []),
        **sampling,
    )
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_cut(row, number, tokenizer.eos_token_id, top_k) for number, row in enumerate(new)]


def _cut(row: list[int], number: int, eos_token_id: int, top_k: TopK) -> Answer:
    """The answer of one row of a batch, without what was generated for others after it ended."""
    end = row.index(eos_token_id) + 1 if eos_token_id in row else len(row)
    kept = top_k.steps[:end]
    none = np.zeros((end, 0))
    return Answer(
        ids=row[:end],
        top_ids=np.stack([ids[number].numpy() for ids, _, _ in kept]) if kept else none.astype(np.int32),
        top_log_probs=np.stack([top[number].numpy() for _, top, _ in kept]) if kept else none.astype(np.float16),
        tail_log_prob=np.array([tail[number].item() for _, _, tail in kept], dtype=np.float32),
    )


def _records(answer: Answer) -> np.ndarray:
    records = np.empty(len(answer.ids), dtype=record_dtype(answer.top_ids.shape[1]))
    records["top_ids"], records["top_log_probs"] = answer.top_ids, answer.top_log_probs
    records["tail_log_prob"] = answer.tail_log_prob
    return records


def _store(path: Path, answers: Sequence[Answer]) -> None:
    """Write a finished batch, whole or not at all."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.savez(
            file,
            ends=np.cumsum([len(answer.ids) for answer in answers]),
            ids=np.concatenate([answer.ids for answer in answers]),
            top_ids=np.concatenate([answer.top_ids for answer in answers]),
            top_log_probs=np.concatenate([answer.top_log_probs for answer in answers]),
            tail_log_prob=np.concatenate([answer.tail_log_prob for answer in answers]),
        )
    partial.rename(path)


def _restore(path: Path) -> list[Answer]:
    with np.load(path) as stored:
        bounds = stored["ends"][:-1]
        columns = [np.split(stored[name], bounds) for name in ("ids", "top_ids", "top_log_probs")]
        tails = np.split(stored["tail_log_prob"], bounds if len(stored["tail_log_prob"]) else [0] * len(bounds))
    return [
        Answer(ids=ids.tolist(), top_ids=top_ids, top_log_probs=top, tail_log_prob=tail)
        for ids, top_ids, top, tail in zip(*columns, tails, strict=True)
    ]


def _write(
    draft: Draft,
    config: GenerateResponsesConfig,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[ChatRecord],
    answers: Sequence[Answer],
    made_by: Sidecar,
    teacher: Path,
) -> None:
    """Write the rows that a student can learn from, and their logits."""
    rows: list[ChatRecord] = []
    kept: list[Answer] = []
    num_truncated = num_ambiguous = num_empty = 0
    for record, answer in zip(records, answers, strict=True):
        text = tokenizer.decode(answer.ids, skip_special_tokens=True)
        if tokenizer.eos_token_id != answer.ids[-1]:
            num_truncated += 1
        elif not text:
            num_empty += 1
        else:
            messages = (*record.messages[:-1], Message(role="assistant", content=text))
            row = record.model_copy(update={"messages": messages})
            encoded = encode_row(tokenizer, row, last_turn_only=True)
            if [encoded.input_ids[position] for position in encoded.targets] != answer.ids:
                num_ambiguous += 1
                continue
            rows.append(row)
            kept.append(answer)
    counts = {"num_truncated": num_truncated, "num_ambiguous": num_ambiguous, "num_empty": num_empty}
    if dropped := {name: count for name, count in counts.items() if count}:
        log.info("%d of %d answers left out: %s", len(records) - len(rows), len(records), dropped)
    if not rows:
        raise endpoint.no_usable_answer(len(records), counts)
    write_jsonl(draft.path / ROWS, rows)
    draft.facts |= {"num_rows": len(rows), **counts}
    if config.logits_top_k:
        info = LogitsInfo(
            k=kept[0].top_ids.shape[1],
            temperature=config.logits_temperature,
            tokenizer_digest=models.tokenizer_digest(teacher),
            template_digest=models.template_digest(teacher),
            teacher_digest=made_by.digest,
        )
        with CachedLogitsWriter(draft.path, info) as logits:
            for answer in kept:
                logits.append(_records(answer))
        draft.facts |= {"top_k": config.logits_top_k, "logits_temperature": config.logits_temperature}
