"""A Hugging Face directory as a teacher, run in this process by transformers."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from slmops import hardware, memory, models, torch_models
from slmops.progress import log
from slmops.teachers.choosing import choose, top_k_records
from slmops.teachers.decoding import FEWER_AT_ONCE, Decoder, Request
from slmops.teachers.interface import STOP, Answer, Decoding, Failure, Question
from slmops.teachers.packed import NotPackable, PackedModel
from slmops.training.batches import encode

BATCHES_AHEAD = 16
"""Batches of questions taken ahead, so that prompts of similar length and beginning are read together."""
LENGTH_BUCKET = 64
"""Prompts whose lengths differ by less are ordered by how they begin."""


class TransformersTeacher:
    """Any causal language model of transformers.

    Most are decoded in packed rows with drafts (`slmops.teachers.decoding`); one that cannot be packed by its own
    `generate`, in batches of equal length. Both find the same answers, up to rounding.
    """

    def __init__(self, name: str, decoding: Decoding, *, directory: Path, batch_size: int, dtype: str) -> None:
        """Load the model.

        Raises:
            ArtifactError, ModelError: it cannot be loaded, or has no chat template.
        """
        self.name, self.decoding, self.batch_size = name, decoding, batch_size
        sidecar = models.open_model(directory)
        hardware.use_all_cores()
        device = hardware.pick_device()
        if device.type == "cpu":
            hardware.keep_freed_memory()
        compute = hardware.pick_dtype(dtype, device)
        self.tokenizer = torch_models.load_tokenizer(directory)
        self._model: PreTrainedModel | None = torch_models.load_model(directory, dtype=compute, device=device)
        self.identity: Mapping[str, str | int | float] = {
            "kind": "model",
            "model": sidecar.digest,
            "dtype": str(compute).removeprefix("torch."),
            "tokenizer": models.tokenizer_digest(directory),
            "template": models.template_digest(directory),
        }
        self._says = f"{sidecar.facts.get('source', directory.name)}@{sidecar.digest[:12]}"
        self.end_tokens = end_tokens(self._model, self.tokenizer)
        config = self._model.config.get_text_config(decoder=True)
        self.context_length = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self._packed: PackedModel | None = None
        try:
            self._packed = PackedModel(self._model)
        except NotPackable as reason:
            log.info("teacher %s is decoded by its own generate, which is slower: %s", name, reason)
        log.info("teacher %s on %s", name, hardware.describe(device, compute))

    def answer(self, questions: Iterable[Question]) -> Generator[tuple[Question, Answer | Failure]]:
        """See `slmops.teachers.interface.Teacher`."""
        asked: dict[int, Question] = {}
        failed: list[tuple[Question, Failure]] = []
        requests = self._requests(iter(questions), asked, failed)
        for request, tokens, records in self._decode(requests):
            yield from _drain(failed)
            yield asked.pop(request.number), self._answer(request, tokens, records)
        yield from _drain(failed)

    def close(self) -> None:
        """Give the memory back."""
        self._model = self._packed = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _requests(
        self, questions: Iterator[Question], asked: dict[int, Question], failed: list[tuple[Question, Failure]]
    ) -> Iterator[Request]:
        """Encode questions as they are needed, some batches ahead, and order those."""
        count = 0
        while window := list(islice(questions, BATCHES_AHEAD * self.batch_size)):
            requests = []
            for question in window:
                request = self._encode(question, count)
                if isinstance(request, Failure):
                    failed.append((question, request))
                else:
                    asked[count] = question
                    requests.append(request)
                count += 1
            yield from sorted(requests, key=lambda request: (len(request.ids) // LENGTH_BUCKET, request.ids))

    def _encode(self, question: Question, number: int) -> Request | Failure:
        try:
            ids = encode(self.tokenizer, [dict(message) for message in question.messages], to_answer=True)
        except TemplateError as error:
            return Failure("template_refused", f"the chat template refuses these turns: {error}")
        if len(ids) >= self.context_length:
            return Failure("prompt_too_long", f"{len(ids)} tokens, the model reads {self.context_length}")
        draft: list[int] = []
        if question.draft:
            encoded: Any = self.tokenizer(question.draft, add_special_tokens=False)
            draft = [*encoded["input_ids"], self.tokenizer.eos_token_id]
        room = min(self.decoding.max_new_tokens, self.context_length - len(ids))
        return Request(number, ids, draft, question.seed, room)

    def _decode(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[int], list[np.ndarray]]]:
        if self._packed is None:
            yield from self._generate(requests)
            return
        decoder = Decoder(
            self._packed,
            self.decoding,
            self.end_tokens,
            max_rows=self.batch_size,
            memory_bytes=_key_value_bytes(self._packed.model.device),
        )
        for row in decoder.decode(requests):
            yield row.request, row.tokens, row.records

    def _generate(self, requests: Iterator[Request]) -> Iterator[tuple[Request, list[int], list[np.ndarray]]]:
        """The plain path: `generate` on prompts of the same length, so that nothing is padded."""
        model, size = cast(Any, self._model), self.batch_size
        while window := list(islice(requests, BATCHES_AHEAD * self.batch_size)):
            window.sort(key=lambda request: len(request.ids))
            for _, group in groupby(window, key=lambda request: len(request.ids)):
                alike = list(group)
                while alike:
                    batch = alike[:size]
                    chooser = Chooser(self.decoding, [request.seed for request in batch])
                    ids = torch.tensor([list(request.ids) for request in batch], device=model.device)
                    try:
                        with torch.inference_mode():
                            output = model.generate(
                                input_ids=ids,
                                attention_mask=torch.ones_like(ids),
                                max_new_tokens=max(request.max_new_tokens for request in batch),
                                do_sample=False,
                                temperature=None,
                                top_p=None,
                                top_k=None,
                                eos_token_id=sorted(self.end_tokens),
                                pad_token_id=self.tokenizer.pad_token_id,
                                logits_processor=LogitsProcessorList([chooser]),
                            )
                    except RuntimeError as error:
                        if not hardware.is_out_of_memory(error) or len(batch) == 1:
                            raise
                        size = len(batch) // 2
                        log.info(FEWER_AT_ONCE, size)
                        continue
                    del alike[:size]
                    for place, (request, new) in enumerate(zip(batch, output[:, ids.shape[1] :].tolist(), strict=True)):
                        tokens = cut(new[: request.max_new_tokens], self.end_tokens)
                        yield request, tokens, [step[place : place + 1] for step in chooser.records[: len(tokens)]]

    def _answer(self, request: Request, tokens: Sequence[int], records: Sequence[np.ndarray]) -> Answer:
        return Answer(
            text=cast(str, self.tokenizer.decode(list(tokens), skip_special_tokens=True)),
            finish_reason=STOP if tokens[-1] in self.end_tokens else "length",
            model=self._says,
            num_prompt_tokens=len(request.ids),
            num_tokens=len(tokens),
            token_ids=tuple(tokens),
            logits=np.concatenate(records) if records else None,
        )


class Chooser(LogitsProcessor):
    """Chooses the tokens of a batch, and leaves `generate` no other choice; notes the likeliest ones if asked to."""

    def __init__(self, decoding: Decoding, seeds: Sequence[int]) -> None:
        self.decoding, self.seeds = decoding, seeds
        self.records: list[np.ndarray] = []
        """[batch] of each step."""
        self._step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.decoding.logits_top_k:
            self.records.append(top_k_records(scores, self.decoding.logits_top_k, self.decoding.logits_temperature))
        chosen = torch.tensor(choose(scores, self.decoding, self.seeds, [self._step] * len(self.seeds)))
        self._step += 1
        forced = torch.full_like(scores, float("-inf"))
        forced.scatter_(-1, chosen.to(scores.device).unsqueeze(-1), 0.0)
        return cast(torch.FloatTensor, forced)


def cut(tokens: list[int], end_tokens: set[int]) -> list[int]:
    """Tokens up to the first that ends a turn, that one included."""
    end = next((at for at, token in enumerate(tokens) if token in end_tokens), len(tokens) - 1)
    return tokens[: end + 1]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends a turn: the tokenizer's end token, and those that the model was published to stop at."""
    config = getattr(model, "generation_config", None)
    listed: Any = getattr(config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _key_value_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * memory.KEY_VALUE_FRACTION)
    return memory.key_value_bytes()


def _drain(failed: list[tuple[Question, Failure]]) -> Iterator[tuple[Question, Failure]]:
    while failed:
        yield failed.pop(0)
