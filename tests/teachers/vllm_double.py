"""A double of the part of vLLM's Python API that VLLMTeacher uses; vLLM itself needs a GPU and cannot run here.

It follows vLLM's documentation (`LLM.generate` on token prompts, one `SamplingParams` each, `RequestOutput.outputs`,
`CompletionOutput.token_ids` with the token that ended the answer, `logprobs` as one mapping from token to `Logprob` for
each position: the likeliest, and the chosen one), and computes with the real model through transformers. It shows
that our side of the interface holds, not that vLLM does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

__version__ = "0.0-double"


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = 16
    seed: int | None = None
    logprobs: int | None = None
    detokenize: bool = True


class LLM:
    def __init__(
        self, model: str, *, dtype: str, max_logprobs: int, logprobs_mode: str, trust_remote_code: bool
    ) -> None:
        assert logprobs_mode == "raw_logprobs"
        assert not trust_remote_code
        self.max_logprobs = max_logprobs
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[SamplingParams], *, use_tqdm: bool
    ) -> list[RequestOutput]:
        assert not use_tqdm
        return [
            RequestOutput(str(number), prompt["prompt_token_ids"], [self._complete(prompt["prompt_token_ids"], params)])
            for number, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True))
        ]

    @torch.inference_mode()
    def _complete(self, prompt: list[int], params: SamplingParams) -> CompletionOutput:
        ids, logprobs, reason = list(prompt), [], "length"
        chance = torch.Generator().manual_seed(params.seed) if params.seed is not None else None
        for _ in range(params.max_tokens or 16):
            scores = torch.log_softmax(self.model(torch.tensor([ids])).logits[0, -1], -1)
            token = int(scores.argmax())
            if params.temperature > 0:
                token = int(torch.multinomial((scores / params.temperature).softmax(-1), 1, generator=chance))
            ids.append(token)
            if params.logprobs is not None:
                assert params.logprobs <= self.max_logprobs
                top = {int(at): Logprob(float(scores[at])) for at in scores.topk(params.logprobs).indices}
                logprobs.append({token: Logprob(float(scores[token]))} | top)
            if token == self.model.config.eos_token_id:
                reason = "stop"
                break
        return CompletionOutput(0, "", ids[len(prompt) :], logprobs or None, reason)
