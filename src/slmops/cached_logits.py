"""A teacher's likeliest tokens for every answer token of a data set, memory-mapped.

Three arrays beside the rows of a responses artifact, and the row's start in them. With k = 64 a token takes
64 * (4 + 2) + 4 = 388 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np

TOP_IDS = "top_ids.npy"
"""[T, k] int32: the k likeliest tokens, likeliest first."""
TOP_LOG_PROBS = "top_log_probs.npy"
"""[T, k] float16: their log-probabilities at the temperature of the artifact."""
TAIL_LOG_PROB = "tail_log_prob.npy"
"""[T] float32: log of the probability of all other tokens."""
ROW_STARTS = "row_starts.npy"
"""[R + 1] int64: row r has the positions row_starts[r] to row_starts[r + 1]."""


@dataclass(frozen=True)
class CachedLogits:
    """The arrays, R rows with T answer tokens in all."""

    top_ids: np.ndarray
    top_log_probs: np.ndarray
    tail_log_prob: np.ndarray
    row_starts: np.ndarray

    def save(self, directory: Path) -> None:
        import numpy as np

        np.save(directory / TOP_IDS, self.top_ids)
        np.save(directory / TOP_LOG_PROBS, self.top_log_probs)
        np.save(directory / TAIL_LOG_PROB, self.tail_log_prob)
        np.save(directory / ROW_STARTS, self.row_starts)


def open_cached_logits(responses: Path, num_rows: int) -> CachedLogits:
    """Map the arrays of a responses artifact without reading them.

    Raises:
        ArtifactError: there are none, or they do not fit the rows.
    """
    import numpy as np

    if not (responses / TOP_IDS).is_file():
        raise ArtifactError(
            f"{responses} holds no logits; run generate_responses with logits_top_k=64, or distill with "
            "teacher_logits=online"
        )
    cached = CachedLogits(
        *(np.load(responses / name, mmap_mode="r") for name in (TOP_IDS, TOP_LOG_PROBS, TAIL_LOG_PROB, ROW_STARTS))
    )
    if len(cached.row_starts) != num_rows + 1 or cached.row_starts[-1] != len(cached.top_ids):
        raise ArtifactError(f"the logits in {responses} do not fit its {num_rows} rows; run generate_responses again")
    return cached
