"""transformers: what a model runs on before it is quantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray

from slmops import hardware, torch_models
from slmops.inference.runtime import Prompt
from slmops.records import ChatRecord
from slmops.training.batches import collate, encode, encode_row, encode_rows, pad_left
from slmops.training.head import SparseHead


class TorchRuntime:
    """A Hugging Face directory."""

    def __init__(self, directory: Path, *, dtype: str, num_threads: int, batch_size: int = 1) -> None:
        torch.set_num_threads(num_threads)
        self.name = f"transformers {transformers.__version__}"
        self.batch_size = batch_size
        device = hardware.pick_device()
        if batch_size > 1 and device.type == "cpu":  # alone, a prompt makes no large tensors, and memory is measured
            hardware.keep_freed_memory()
        self.tokenizer = torch_models.load_tokenizer(directory)
        self.model = torch_models.load_model(directory, dtype=hardware.pick_dtype(dtype, device), device=device)

    @torch.inference_mode()
    def stream(self, prompt: Prompt, max_new_tokens: int) -> Iterator[int]:
        ids = torch.tensor([encode(self.tokenizer, prompt, to_answer=True)], device=self.model.device)
        cache = transformers.DynamicCache(config=self.model.config)
        for _ in range(max_new_tokens):
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            token = int(ids)
            if token == self.tokenizer.eos_token_id:
                return
            yield token

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            encoded = [
                encode(self.tokenizer, prompt, to_answer=True) for prompt in prompts[start : start + self.batch_size]
            ]
            inputs = pad_left(encoded, self.tokenizer.pad_token_id, self.model.device)
            output = self.model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            new = output[:, inputs["input_ids"].shape[1] :]
            answers += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    @torch.inference_mode()
    def answer_losses(self, records: Sequence[ChatRecord]) -> list[tuple[float, int]]:
        rows = encode_rows(self.tokenizer, records, self.context_length, last_turn_only=True)
        rows.sort(key=lambda row: len(row.input_ids))
        losses: dict[int, tuple[float, int]] = {}
        for start in range(0, len(rows), self.batch_size):
            batch = collate(
                rows[start : start + self.batch_size],
                self.tokenizer.pad_token_id,
                self.model.device,
                shared_prefix=self._shares_prefix,
            )
            values = F.cross_entropy(self._head.logits(batch), batch.target_ids, reduction="none")
            for row, value in zip(batch.rows, values.split([len(row.targets) for row in batch.rows]), strict=True):
                losses[row.index] = (float(value.sum()), len(row.targets))
        return [losses[index] for index in sorted(losses)]

    @cached_property
    def context_length(self) -> int:
        return int(getattr(self.model.config, "max_position_embeddings", 1_000_000))

    def encode_row(self, record: ChatRecord) -> tuple[list[int], int]:
        row = encode_row(self.tokenizer, record, last_turn_only=True)
        return row.input_ids, row.targets[0] if row.targets else len(row.input_ids)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> NDArray[Any]:
        found = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False).logits[0]
        return np.asarray(found.float().cpu().numpy())

    @cached_property
    def _head(self) -> SparseHead:
        return SparseHead(self.model)

    @cached_property
    def _shares_prefix(self) -> bool:
        return self._head.shares_prefix()
