"""A teacher that runs in this process, by transformers and torch, on a GPU or CPUs."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slmops import hardware, models, torch_models
from slmops.errors import ModelError
from slmops.progress import log
from slmops.teachers.decoding import Decoder, Request, Row
from slmops.teachers.interface import STOP, Answer, Decoding, Failure, Question
from slmops.teachers.packed import PACKED, NotPackable, PackedModel
from slmops.teachers.padded import PaddedDecoder
from slmops.training.batches import encode

BATCHES_AHEAD = 16
"""Questions are taken so many batches at a time, and asked in the order in which they share most."""


class TransformersTeacher:
    """Answers with a Hugging Face directory. The weights are loaded when the first question comes."""

    def __init__(self, name: str, decoding: Decoding, *, directory: Path, batch_size: int, dtype: str) -> None:
        """Look at the directory.

        Raises:
            ModelError: it is no model, or has no chat template.
        """
        self.name, self.decoding, self.batch_size = name, decoding, batch_size
        self._directory = directory
        self._device = hardware.pick_device()
        self._dtype = hardware.pick_dtype(dtype, self._device)
        digest = models.open_model(directory).digest
        self.identity: Mapping[str, str | int | float] = {
            "kind": "model",
            "digest": digest,
            "dtype": str(self._dtype).removeprefix("torch."),
            "tokenizer_digest": models.tokenizer_digest(directory),
            "template_digest": models.template_digest(directory),
        }
        self._says = f"{directory.name}@{digest[:12]}"
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Answer | Failure]]:
        """Answer `questions`, some batches of them at a time.

        Raises:
            ModelError: the model cannot be loaded, or not even one question at a time fits into memory.
        """
        source = iter(questions)
        while window := list(islice(source, BATCHES_AHEAD * self.batch_size)):
            yield from self._answer(window)

    def close(self) -> None:
        """Give back the memory of the weights."""
        self._model = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _answer(self, window: list[Question]) -> Iterator[tuple[Question, Answer | Failure]]:
        model = self._load()
        longest = int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 1 << 30))
        encoded = [
            encode(self._tokenizer, [dict(turn) for turn in question.messages], to_answer=True) for question in window
        ]
        requests: dict[int, Request] = {}
        for number, (question, ids) in enumerate(zip(window, encoded, strict=True)):
            if len(ids) >= longest:
                found = f"a prompt of {len(ids):,} tokens, the model reads {longest:,}"
                yield question, Failure("prompt_too_long", found)
                continue
            limit = min(self.decoding.max_new_tokens, longest - len(ids))
            requests[number] = Request(number, ids, self._draft(question), question.seed, limit)
        while requests:
            try:
                for row in self._decode(list(requests.values())):
                    done = requests.pop(row.request.number)
                    yield window[done.number], self._answer_of(row)
            except torch.OutOfMemoryError:
                self._halve()

    def _decode(self, requests: list[Request]) -> Iterator[Row]:
        """Rows as they are complete; prompts that begin alike are read together."""
        model, ends = self._load(), self._end_tokens()
        batch = self.batch_size * 2  # similar length first, so that few wait for a long one; within it alike beginnings
        by_length = sorted(requests, key=lambda request: len(request.ids))
        chunks = [by_length[at : at + batch] for at in range(0, len(by_length), batch)]
        ordered = [request for chunk in chunks for request in sorted(chunk, key=lambda request: request.ids)]
        with torch.inference_mode():
            try:
                packed = PackedModel(model, self.batch_size)
                model.set_attn_implementation(PACKED)
            except NotPackable as reason:
                log.info("%s is run in padded batches: %s", self.name, reason)
                model.set_attn_implementation("eager" if self._device.type == "cpu" else "sdpa")
                yield from PaddedDecoder(model, self.decoding, ends, self.batch_size).decode(ordered)
                return
            yield from Decoder(packed, self.decoding, ends, self.batch_size).decode(iter(ordered))

    def _draft(self, question: Question) -> list[int]:
        if not question.draft or not self.decoding.greedy:
            return []
        ids = self._tokenizer(question.draft, add_special_tokens=False)["input_ids"]
        return [*ids, self._tokenizer.eos_token_id]

    def _answer_of(self, row: Row) -> Answer:
        import numpy as np

        ended = row.tokens[-1] in self._end_tokens()
        return Answer(
            text=self._tokenizer.decode(row.tokens, skip_special_tokens=True),
            finish_reason=STOP if ended else "length",
            model=self._says,
            num_prompt_tokens=len(row.request.ids),
            num_tokens=len(row.tokens),
            token_ids=tuple(row.tokens),
            logits=np.concatenate(row.records) if row.records else None,
        )

    def _load(self) -> PreTrainedModel:
        if self._model is None:
            hardware.use_all_cores()
            self._tokenizer = torch_models.load_tokenizer(self._directory)
            self._model = torch_models.load_model(self._directory, dtype=self._dtype, device=self._device)
            log.info("%s runs on %s", self.name, hardware.describe(self._device, self._dtype))
        return self._model

    def _end_tokens(self) -> set[int]:
        """The tokens after which the model has nothing more to say."""
        settings = self._load().generation_config
        ends = getattr(settings, "eos_token_id", None)
        listed = ends if isinstance(ends, list) else [ends]
        return {int(token) for token in (*listed, self._tokenizer.eos_token_id) if token is not None}

    def _halve(self) -> None:
        if self.batch_size == 1:
            raise ModelError(
                f"{self._directory.name} and one prompt need more memory than {self._device} has; use a smaller teacher, a "
                "larger GPU, or an endpoint"
            )
        self.batch_size //= 2
        log.warning("%s ran out of memory: going on with batch_size=%d", self.name, self.batch_size)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
