"""A quantized variant as a language model of lm_eval: ONNX Runtime GenAI, one row at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from slmops import cpus
from slmops.errors import ConfigError, ModelError
from slmops.inference.genai import GenAIRuntime
from slmops.lm_evaluate.config import LmEvaluateConfig
from slmops.lm_evaluate.quiet import Count

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""(context and continuation as text, tokens of the context, tokens of the continuation)"""


class GenAILM(TemplateLM):
    """The runtime's own tokenizer and chat template, not those of transformers: both belong to what is shipped.

    Sequences are cut, and text ends at stop strings, as lm_eval's HFLM does it, so that the figures of a variant stand
    beside those of its model.
    """

    def __init__(self, directory: Path, config: LmEvaluateConfig, count: Count) -> None:
        """
        Raises:
            ModelError: the variant cannot be loaded.
        """
        super().__init__()
        self._runtime = GenAIRuntime(directory, num_threads=cpus.count())
        self._directory, self._count = directory, count
        self._tokens = self._runtime.tokenizer
        self.name = self._runtime.name
        self.max_length = min(config.max_length, self._runtime.context_length)
        self._max_new_tokens = config.max_new_tokens
        self._prefix = json.loads((directory / "genai_config.json").read_text())["model"].get("bos_token_id")
        self._prefix_text = self._decode([self.prefix_token_id], special=True)

    @property
    def eot_token_id(self) -> int:
        return int(min(self._runtime.end_tokens))

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._prefix is None else int(self._prefix)

    @property
    def tokenizer_name(self) -> str:
        return self._directory.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with the tokenizer's own first token, unless the text begins with that already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        self._tokens.update_options(add_special_tokens=str(add_special_tokens).lower())
        return [int(token) for token in self._tokens.encode(string)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a generation prompt, the last turn is the answer's beginning."""
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        turns = chat_history if add_generation_prompt else chat_history[:-1]
        try:
            return str(self._tokens.apply_chat_template(json.dumps(turns), add_generation_prompt=True)) + begun
        except Exception as error:  # the library raises RuntimeError and bare Exception alike
            reason = str(error).splitlines()[0]
            raise ModelError(f"the chat template of {self._directory} refuses a prompt: {reason}") from error

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._count.start("loglikelihood", len(requests))
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[TokenRequest], **_: Any) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding would give it."""
        return [self._score(context, continuation) for _text, context, continuation in requests]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        # As many tokens as the model reads, and the one behind them, which it only predicts.
        ids = (context + continuation)[-(self.max_length + 1) :]
        log_probs, greedy = self._runtime.log_likelihoods(ids, min(len(continuation), len(ids) - 1))
        self._count.advance()
        return sum(log_probs), greedy

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each whole text, in windows of `max_length` tokens."""
        self._count.start("loglikelihood_rolling", len(requests))
        return [sum(self._score(*window)[0] for window in self._windows(request.args[0])) for request in requests]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        ids = self.tok_encode(text)
        windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
        return [utils.make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The likeliest continuation of each text, up to a stop string, the end of turn or the longest length."""
        self._count.start("generate_until", len(requests))
        return [self._generate(*request.args[:2]) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        options = normalize_gen_kwargs(settings, self._max_new_tokens)
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        num_new = options["max_gen_toks"]
        if num_new >= self.max_length:
            raise ConfigError(
                f"a task asks for {num_new:,} new tokens, and no more than {self.max_length:,} fit with the prompt; "
                "set max_gen_toks in its generation_kwargs, or raise max_length"
            )
        ids = self.tok_encode(context)[-(self.max_length - num_new) :]
        pieces, text = self._tokens.create_stream(), ""
        for token in self._runtime.continue_ids(ids, num_new):
            text += pieces.decode(token)
            if any(stop in text for stop in stops):
                break
        self._count.advance()
        return str(postprocess_generated_text(text, stops, None))

    def _decode(self, ids: list[int], *, special: bool) -> str:
        self._tokens.update_options(skip_special_tokens=str(not special).lower())
        text = str(self._tokens.decode(ids))
        self._tokens.update_options(skip_special_tokens="true")
        return text
