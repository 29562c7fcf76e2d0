"""The files of a responses artifact, written row by row."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

from slmops.cached_logits import CachedLogitsWriter, LogitsInfo
from slmops.errors import explain_os_errors
from slmops.generate_responses.config import GenerateResponsesConfig
from slmops.records import ROWS, TOP_LOGPROBS, ChatRecord, json_line
from slmops.teachers.interface import Answer


class Output:
    """Rows, and what is kept of the teachers' distribution; a context manager that holds no row in memory."""

    def __init__(
        self,
        directory: Path,
        config: GenerateResponsesConfig,
        identity: Mapping[str, str | int | float],
        model: Path | None,
    ) -> None:
        """Write to `directory`.

        Args:
            identity: Of the teachers whose logits are kept; they have one tokenizer and one template.
            model: The directory of one of them; None if no logits are kept.
        """
        self.num_rows = 0
        self._directory, self._config, self._identity, self._model = directory, config, identity, model
        self._num_tokens = 0
        self._teachers: set[str] = set()
        self._stack = ExitStack()
        self._rows: IO[str]
        self._alternatives: IO[str] | None = None
        self._logits: CachedLogitsWriter | None = None

    def __enter__(self) -> Self:
        self._stack.enter_context(explain_os_errors(self._directory))
        self._rows = self._open(ROWS)
        if self._config.top_logprobs:
            self._alternatives = self._open(TOP_LOGPROBS)
        if self._config.logits_top_k and self._model:
            from slmops import torch_models  # loads transformers, which an endpoint's answers do without

            self._tokenizer = torch_models.load_tokenizer(self._model)
            self._logits = self._stack.enter_context(
                CachedLogitsWriter(
                    self._directory,
                    LogitsInfo(
                        k=self._config.logits_top_k,
                        temperature=self._config.logits_temperature,
                        tokenizer_digest=str(self._identity["tokenizer"]),
                        template_digest=str(self._identity["template"]),
                        teacher_digest=str(self._identity["model"]),
                    ),
                )
            )
        return self

    def __exit__(self, *failure: Any) -> None:
        self._stack.__exit__(*failure)

    def write(self, row: ChatRecord, answer: Answer) -> bool:
        """Write a row with what is kept beside it; False if its text does not turn into the answer's tokens again.

        A student could not learn from such a row what the teacher meant by each token.
        """
        if self._logits:
            from slmops.training.batches import retokenizes

            if answer.logits is None or not retokenizes(self._tokenizer, row, answer.token_ids):
                return False
            self._logits.append(answer.logits)
        if self._alternatives and answer.top_logprobs:
            self._alternatives.write(json_line({"id": row.id, "tokens": list(answer.top_logprobs)}))
        self._rows.write(json_line(row))
        self.num_rows += 1
        self._num_tokens += answer.num_tokens
        self._teachers.add(answer.model)
        return True

    def facts(self) -> dict[str, Any]:
        """What the artifact's sidecar says of it."""
        facts: dict[str, Any] = {
            "num_rows": self.num_rows,
            "num_tokens": self._num_tokens,
            "teacher": ", ".join(sorted(self._teachers)),
        }
        if self._logits:
            facts |= {
                "top_k": self._config.logits_top_k,
                "logits_temperature": self._config.logits_temperature,
                "tokenizer_digest": self._identity["tokenizer"],
                "template_digest": self._identity["template"],
            }
        return facts

    def _open(self, name: str) -> IO[str]:
        return self._stack.enter_context(open(self._directory / name, "w", encoding="utf-8"))
