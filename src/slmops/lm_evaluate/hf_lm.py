"""A Hugging Face directory, as lm_eval's own HFLM runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from lm_eval.models.huggingface import HFLM

from slmops import hardware, models, torch_models
from slmops.errors import ModelError
from slmops.lm_evaluate.config import LmEvaluateConfig
from slmops.lm_evaluate.quiet import Count


class CountingHFLM(HFLM):
    """HFLM that says how far it is."""

    def __init__(self, directory: Path, config: LmEvaluateConfig, count: Count) -> None:
        """
        Raises:
            ModelError: the model cannot be loaded, has no chat template where one is wanted, or too short a context.
        """
        device = hardware.pick_device()
        tokenizer = _tokenizer(directory)
        if config.apply_chat_template and not tokenizer.chat_template:
            raise models.no_chat_template(directory)
        model = torch_models.load_model(directory, dtype=hardware.pick_dtype(config.dtype, device), device=device)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=config.batch_size)
        self._max_length = min(config.max_length, super().max_length)
        self._max_new_tokens, self._count = config.max_new_tokens, count
        self.name = f"transformers {transformers.__version__}"

    @property
    def max_gen_toks(self) -> int:
        return self._max_new_tokens

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._count.start("loglikelihood", len(requests))
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._count.start("loglikelihood_rolling", len(requests))
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._count.start("generate_until", len(requests))
        return super().generate_until(requests, disable_tqdm)

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        logits = super()._model_call(inps, attn_mask, labels)
        self._count.advance(len(inps))
        return logits

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        ids = super()._model_generate(context, max_length, stop, **options)
        self._count.advance(len(context))
        return ids


def _tokenizer(directory: Path) -> Any:
    """The tokenizer; a base model's has no chat template, and need not."""
    try:
        with torch_models.quiet_libraries():
            return transformers.AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {directory} cannot be loaded: {str(error).splitlines()[0]}") from error
