"""ONNX Runtime GenAI: what runs on an edge node. Imports neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnxruntime_genai as og

from slmops.errors import ModelError
from slmops.inference.runtime import Prompt
from slmops.records import ChatRecord


class GenAIRuntime:
    """A quantized variant, loaded as an edge node loads it."""

    def __init__(self, directory: Path, *, num_threads: int) -> None:
        self.name = f"onnxruntime-genai {og.__version__}"
        try:
            config = og.Config(str(directory))
            config.overlay(
                json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": num_threads}}}})
            )
            self.model = og.Model(config)
            self.tokenizer = og.Tokenizer(self.model)
        except Exception as error:  # the library raises RuntimeError, OgaException and bare Exception alike
            raise ModelError(
                f"{directory} cannot be loaded by {self.name}: {str(error).splitlines()[0]}; run quantize again"
            ) from error
        settings = json.loads((directory / "genai_config.json").read_text())["model"]
        end = settings["eos_token_id"]
        self.end_tokens = set(end if isinstance(end, list) else [end])
        self.context_length = int(settings["context_length"])

    def stream(self, prompt: Prompt, max_new_tokens: int) -> Iterator[int]:
        ids = self._encode(prompt, to_answer=True)
        generator = self._generator(min(len(ids) + max_new_tokens, self.context_length))
        generator.append_tokens(ids)
        for _ in range(max_new_tokens):
            if generator.is_done():
                return
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self.end_tokens:
                return
            yield token

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        return [self.tokenizer.decode(list(self.stream(prompt, max_new_tokens))) for prompt in prompts]

    def answer_losses(self, records: Sequence[ChatRecord]) -> list[tuple[float, int]]:
        import numpy as np

        losses = []
        for record in records:
            prompt = self._encode(record.prompt, to_answer=True)
            ids = self._encode([message.model_dump() for message in record.messages], to_answer=False)
            ends = [at for at in range(len(prompt), len(ids)) if ids[at] in self.end_tokens]
            ids = ids[: ends[0] + 1] if ends else ids
            generator = self._generator(len(ids) + 1)
            generator.append_tokens(ids)
            logits = generator.get_output("logits")[0, len(prompt) - 1 : -1].astype(np.float64)
            peak = logits.max(-1, keepdims=True)
            log_sums = np.log(np.exp(logits - peak).sum(-1)) + peak[:, 0]
            targets = ids[len(prompt) :]
            losses.append((float((log_sums - logits[np.arange(len(targets)), targets]).sum()), len(targets)))
        return losses

    def _encode(self, messages: Prompt, *, to_answer: bool) -> list[int]:
        text = self.tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=to_answer)
        return [int(token) for token in self.tokenizer.encode(text)]

    def _generator(self, max_length: int) -> og.Generator:
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=max_length, do_sample=False)
        return og.Generator(self.model, parameters)
