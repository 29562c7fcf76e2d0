"""Conversations as token ids and back, without transformers: a model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from slmops.chat_template import ChatTemplate, RenderError
from slmops.errors import DataError, ModelError, explain_os_errors

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"


class Conversation:
    """The tokenizer and chat template of a directory as `save_pretrained` writes them."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            ArtifactError: a file is missing.
            ModelError: a file is damaged.
        """
        self._tokenizer = _read_tokenizer(directory / TOKENIZER)
        self._template = ChatTemplate.read(directory)

    def render(self, messages: Sequence[dict[str, str]], *, to_answer: bool) -> str:
        """A conversation as text; with `to_answer`, up to where the assistant's next turn begins.

        Raises:
            DataError: the template refuses the conversation, as some do with a system turn.
        """
        try:
            return self._template.render([(turn["role"], turn["content"]) for turn in messages], answer=to_answer)
        except RenderError as error:
            raise DataError(f"the model's chat template refuses the conversation: {error}") from None

    def encode_messages(self, messages: Sequence[dict[str, str]], *, to_answer: bool) -> list[int]:
        """Token ids of `render`. Special tokens come from the template alone."""
        return self.encode(self.render(messages, to_answer=to_answer))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with nothing added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def _read_tokenizer(file: Path) -> Tokenizer:
    with explain_os_errors(file):
        text = file.read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{file} is no tokenizer ({str(error)[:200]}); save the model's tokenizer again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
