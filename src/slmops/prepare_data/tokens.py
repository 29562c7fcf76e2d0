"""Lengths in tokens, as the student will see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slmops import storage
from slmops.errors import ModelError
from slmops.models import tokenizer_digest

if TYPE_CHECKING:
    import numpy as np

TOKENIZER = "tokenizer.json"


class TokenCounter:
    """Counts with the tokenizer of a model directory."""

    def __init__(self, model_uri: str, directory: Path) -> None:
        """Take one file of the model at `model_uri`; if it is far away, `directory` takes a copy.

        Raises:
            ModelError: the model has no tokenizer.json that can be read.
            StoreError, TransientError: it cannot be reached.
        """
        from tokenizers import Tokenizer

        path = storage.fetch(f"{model_uri.rstrip('/')}/{TOKENIZER}", directory)
        if not path.is_file():
            raise ModelError(f"{model_uri} has no {TOKENIZER}; give the directory of a model with a fast tokenizer")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            self.digest = tokenizer_digest(path.parent)
        except Exception as error:  # the library raises Exception itself
            raise ModelError(f"{path} cannot be read ({error}); save the model's tokenizer again") from None
        # A file may say how batches were made up when it was saved; that is not how long a text is.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = model_uri.rstrip("/").rpartition("/")[2]

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """[len(texts)] int32: tokens of each text, without special tokens around it."""
        import numpy as np

        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return np.fromiter((len(one) for one in encoded), np.int32, len(texts))
