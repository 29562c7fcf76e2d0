"""A quantized variant as a teacher, run in this process by ONNX Runtime GenAI."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops import artifacts, cpus, memory, models
from slmops.errors import ArtifactError, ConfigError, ModelError
from slmops.teachers.interface import STOP, Answer, Decoding, Failure, Question

if TYPE_CHECKING:
    import numpy as np

BATCHES_AHEAD = 16
"""Batches of questions taken ahead, of which those of equal length are answered together."""
CACHE_SHAPE = ("num_hidden_layers", "num_key_value_heads", "head_size")
"""What genai_config.json says of keys and values."""
CACHE_BYTES = 4
"""Of a key or value: float32, the widest that the runtime takes."""


class GenAITeacher:
    """A directory of ONNX Runtime GenAI.

    Prompts of the same length go through the model together. Those of different length do not: the runtime tells
    padding from text by the token alone, and many models end their turns with the token that they pad with.
    """

    def __init__(self, name: str, decoding: Decoding, *, directory: Path, batch_size: int) -> None:
        """Load the variant.

        Raises:
            ArtifactError: it is no directory of ONNX Runtime GenAI.
            ModelError: the runtime refuses it, or it has no chat template.
            ConfigError: the runtime is not installed.
        """
        try:
            import onnxruntime_genai as og
        except ImportError as error:
            raise ConfigError(
                f"teacher {name} is of kind genai, and onnxruntime-genai cannot be imported ({error}); install it with "
                "pip install 'slmops[optimize]', or run the step in the optimize image"
            ) from None
        self._og = og
        self.name, self.decoding, self.batch_size = name, decoding, batch_size
        settings = _read_settings(directory)
        template = models.template_digest(directory)
        try:
            config = og.Config(str(directory))
            threads = {"intra_op_num_threads": cpus.count()}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
            self._model = og.Model(config)
            self._tokenizer = og.Tokenizer(self._model)
        except Exception as error:  # the library raises RuntimeError, OgaException and bare Exception alike
            raise ModelError(
                f"{directory} cannot be loaded by onnxruntime-genai {og.__version__}: {str(error).splitlines()[0]}; "
                "run quantize again"
            ) from error
        self.end_tokens = {int(token) for token in self._tokenizer.eos_token_ids}
        self.context_length = int(settings["context_length"])
        decoder = settings["decoder"]
        self._bytes_per_token = 2 * CACHE_BYTES * math.prod(int(decoder[name]) for name in CACHE_SHAPE)
        digest = artifacts.digest_of(tuple(artifacts.list_files(directory)))
        self.identity: Mapping[str, str | int | float] = {
            "kind": "genai",
            "model": digest,
            "dtype": f"onnxruntime-genai {og.__version__}",
            "tokenizer": models.tokenizer_digest(directory),
            "template": template,
        }
        self._says = f"{directory.name}@{digest[:12]}"

    def answer(self, questions: Iterable[Question]) -> Generator[tuple[Question, Answer | Failure]]:
        """See `slmops.teachers.interface.Teacher`."""
        remaining = iter(questions)
        while window := list(islice(remaining, BATCHES_AHEAD * self.batch_size)):
            encoded: list[tuple[Question, list[int]]] = []
            for question in window:
                ids = self._encode(question)
                if isinstance(ids, Failure):
                    yield question, ids
                else:
                    encoded.append((question, ids))
            encoded.sort(key=lambda pair: len(pair[1]))
            for _, group in groupby(encoded, key=lambda pair: len(pair[1])):
                alike = list(group)
                size = self._rows_at_once(len(alike[0][1]))
                for start in range(0, len(alike), size):
                    batch = alike[start : start + size]
                    answers = self._answer_batch([question for question, _ in batch], [ids for _, ids in batch])
                    yield from zip((question for question, _ in batch), answers, strict=True)

    def close(self) -> None:
        """Give the memory back."""
        self._model = self._tokenizer = None

    def _rows_at_once(self, length: int) -> int:
        """How many prompts of a length are answered together: keys and values have room for the longest answers."""
        tokens = min(length + self.decoding.max_new_tokens, self.context_length)
        return max(1, min(self.batch_size, memory.key_value_bytes() // (tokens * self._bytes_per_token)))

    def _tokens(self, messages: Sequence[dict[str, str]], *, to_answer: bool) -> list[int]:
        text = self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=to_answer)
        return [int(token) for token in self._tokenizer.encode(text)]

    def _encode(self, question: Question) -> list[int] | Failure:
        try:
            ids = self._tokens([dict(message) for message in question.messages], to_answer=True)
        except Exception as error:  # see above
            return Failure("template_refused", f"the chat template refuses these turns: {str(error).splitlines()[0]}")
        if len(ids) >= self.context_length:
            return Failure("prompt_too_long", f"{len(ids)} tokens, the model reads {self.context_length}")
        return ids

    def _answer_batch(self, questions: Sequence[Question], prompts: Sequence[list[int]]) -> list[Answer]:
        """Answer prompts of the same length together; rows that have ended are carried along until all have."""
        import numpy as np
        import torch

        from slmops.teachers.choosing import choose, top_k_records

        length, decoding = len(prompts[0]), self.decoding
        limit = min(decoding.max_new_tokens, self.context_length - length)
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length + limit, batch_size=len(prompts), do_sample=False)
        generator = self._og.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        tokens: list[list[int]] = [[] for _ in prompts]
        records: list[list[np.ndarray]] = [[] for _ in prompts]
        open_rows = list(range(len(prompts)))
        for step in range(limit):
            kept = None
            if decoding.logits_top_k or not decoding.greedy:
                logits = torch.from_numpy(np.asarray(generator.get_logits()).reshape(len(prompts), -1))
                if decoding.logits_top_k:
                    kept = top_k_records(logits, decoding.logits_top_k, decoding.logits_temperature)
                if not decoding.greedy:
                    chosen = choose(logits, decoding, [question.seed for question in questions], [step] * len(prompts))
                    generator.set_logits(_only(chosen, logits.shape[-1]))
            generator.generate_next_token()
            found = [int(token) for token in generator.get_next_tokens()]
            for row in open_rows:
                tokens[row].append(found[row])
                if kept is not None:
                    records[row].append(kept[row : row + 1])
            open_rows = [row for row in open_rows if found[row] not in self.end_tokens]
            if not open_rows:
                break
        return [
            Answer(
                text=self._tokenizer.decode([token for token in row if token not in self.end_tokens]),
                finish_reason=STOP if row[-1] in self.end_tokens else "length",
                model=self._says,
                num_prompt_tokens=length,
                num_tokens=len(row),
                token_ids=tuple(row),
                logits=np.concatenate(pieces) if pieces else None,
            )
            for row, pieces in zip(tokens, records, strict=True)
        ]


def _only(chosen: Sequence[int], vocabulary: int) -> np.ndarray:
    """[N, 1, V] logits that leave the runtime no choice but `chosen` [N]."""
    import numpy as np

    logits = np.full((len(chosen), 1, vocabulary), -1e30, dtype=np.float32)
    logits[np.arange(len(chosen)), 0, list(chosen)] = 0.0
    return logits


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / "genai_config.json"
    if not path.is_file():
        raise ArtifactError(
            f"{directory} has no genai_config.json; give one variant's directory, such as cpu-int4 in what "
            "quantize wrote"
        )
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model"]
        for value in (settings["context_length"], *(settings["decoder"][name] for name in CACHE_SHAPE)):
            int(value)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not what ONNX Runtime GenAI writes ({error!r}); run quantize again") from None
    return settings
