"""Lengths in tokens, as the student will see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.errors import ModelError
from slmops.models import tokenizer_digest

if TYPE_CHECKING:
    import numpy as np

TOKENIZER = "tokenizer.json"


class TokenCounter:
    """Counts with the tokenizer of a model directory.

    Raises:
        ModelError: the directory has no tokenizer.json that can be read.
    """

    def __init__(self, tokenizer_dir: Path) -> None:
        from tokenizers import Tokenizer

        path = tokenizer_dir / TOKENIZER
        if not path.is_file():
            raise ModelError(f"{tokenizer_dir} has no {TOKENIZER}; give the directory of a model with a fast tokenizer")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            self.digest = tokenizer_digest(tokenizer_dir)
        # The library raises Exception itself.
        except Exception as error:
            raise ModelError(f"{path} cannot be read ({error}); save the model's tokenizer again") from None
        # A file may say how batches were made up when it was saved; that is not how long a text is.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = tokenizer_dir.name

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """[len(texts)] int32: tokens of each text, without special tokens around it."""
        import numpy as np

        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return np.fromiter((len(one) for one in encoded), np.int32, len(texts))
