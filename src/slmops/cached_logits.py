"""A teacher's likeliest tokens for every answer token of a data set, memory-mapped.

Three files beside the rows of a responses artifact:

    logits.bin       one record for each answer token, in the order of the rows, little-endian, without padding:
                         k int32      the likeliest tokens, likeliest first
                         k float16    their log-probabilities at `temperature`
                         1 float32    log of the probability of all other tokens
    row_starts.npy   [R + 1] int64: row r has the records row_starts[r] to row_starts[r + 1]
    logits.json      what they mean, written last: k, temperature, num_rows, num_tokens, and the digests of the
                     tokenizer, the chat template and the teacher

A record takes 6 k + 4 bytes, 388 with k = 64. Files of shards are merged by putting the bytes one behind the other.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slmops.artifacts import Sha256
from slmops.errors import ArtifactError, ModelError, explain_os_errors

if TYPE_CHECKING:
    import numpy as np

RECORDS = "logits.bin"
ROW_STARTS = "row_starts.npy"
DESCRIPTION = "logits.json"
COPY_BYTES = 1 << 20
NPY_HEADER_BYTES = 128
"""numpy's header of a one-dimensional array, with room for any length."""


class LogitsInfo(BaseModel):
    """What `logits.json` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    k: int = Field(ge=1)
    temperature: float = Field(gt=0)
    """At which the log-probabilities were taken."""
    tokenizer_digest: Sha256
    """`models.tokenizer_digest` of the teacher."""
    template_digest: Sha256
    """`models.template_digest` of the teacher."""
    teacher_digest: str = Field(min_length=1)
    """Of its model directory."""
    num_rows: int = Field(default=0, ge=0)
    num_tokens: int = Field(default=0, ge=0)


def record_dtype(k: int) -> np.dtype:
    """One answer token: `top_ids` [k], `top_log_probs` [k], `tail_log_prob`; 6 k + 4 bytes."""
    import numpy as np

    return np.dtype([("top_ids", "<i4", (k,)), ("top_log_probs", "<f2", (k,)), ("tail_log_prob", "<f4")])


class CachedLogits:
    """The records of R rows with T answer tokens in all, mapped."""

    def __init__(self, info: LogitsInfo, records: np.ndarray, row_starts: np.ndarray) -> None:
        self.info = info
        self.records = records
        """[T] of `record_dtype`."""
        self.row_starts = row_starts
        """[R + 1] int64."""

    @property
    def top_ids(self) -> np.ndarray:
        """[T, k] int32, likeliest first."""
        return self.records["top_ids"]

    @property
    def top_log_probs(self) -> np.ndarray:
        """[T, k] float16."""
        return self.records["top_log_probs"]

    @property
    def tail_log_prob(self) -> np.ndarray:
        """[T] float32."""
        return self.records["tail_log_prob"]


class CachedLogitsWriter:
    """Writes the three files row by row; memory does not grow. Use as a context manager.

    `logits.json` is written when the block ends without an error, so what is half-written is never read.
    """

    def __init__(self, directory: Path, info: LogitsInfo) -> None:
        import numpy as np

        self.directory, self.info, self._numpy = directory, info, np
        self.dtype = record_dtype(info.k)
        self.num_rows = self.num_tokens = 0
        self._records: BinaryIO = open(directory / RECORDS, "wb")  # noqa: SIM115 (closed by __exit__)
        self._starts: BinaryIO = open(directory / ROW_STARTS, "wb")  # noqa: SIM115
        self._starts.write(bytes(NPY_HEADER_BYTES + 8))

    def append(self, records: np.ndarray) -> None:
        """Add the records [n] of one row.

        Raises:
            ValueError: they were taken with another k.
        """
        if records.dtype != self.dtype:
            raise ValueError(f"records of {self.dtype} are written here, got {records.dtype}")
        self._records.write(self._numpy.ascontiguousarray(records).data)
        self.num_rows += 1
        self.num_tokens += len(records)
        self._starts.write(self.num_tokens.to_bytes(8, "little"))

    def append_part(self, directory: Path, info: LogitsInfo) -> None:
        """Add all rows of other kept logits, with the same k."""
        with open(directory / RECORDS, "rb") as records:
            shutil.copyfileobj(records, self._records, COPY_BYTES)
        with open(directory / ROW_STARTS, "rb") as starts:
            starts.seek(NPY_HEADER_BYTES + 8)
            while piece := starts.read(COPY_BYTES):
                shifted = self._numpy.frombuffer(piece, "<i8") + self.num_tokens
                self._starts.write(shifted.astype("<i8").data)
        self.num_rows += info.num_rows
        self.num_tokens += info.num_tokens

    def __enter__(self) -> CachedLogitsWriter:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        with self._records, self._starts:
            self._starts.seek(0)
            self._starts.write(_npy_header(self.num_rows + 1))
        if failure is None:
            info = self.info.model_copy(update={"num_rows": self.num_rows, "num_tokens": self.num_tokens})
            (self.directory / DESCRIPTION).write_text(info.model_dump_json(indent=1) + "\n")


def _npy_header(length: int) -> bytes:
    """The header of an .npy file with `length` int64 (numpy's format, version 1.0), of fixed size."""
    import numpy as np

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (length,)})
    written = header.getvalue()
    if len(written) != NPY_HEADER_BYTES:
        raise AssertionError(f"numpy wrote a header of {len(written)} bytes")
    return written


def open_cached_logits(
    responses: Path, num_rows: int, *, tokenizer_digest: str | None = None, template_digest: str | None = None
) -> CachedLogits:
    """Map the records of a responses artifact without reading them.

    Args:
        responses: its directory.
        num_rows: rows of the artifact.
        tokenizer_digest: of who is to learn from them; None asks nothing.
        template_digest: likewise.

    Raises:
        ArtifactError: there are none, they are damaged, or they do not fit the rows.
        ModelError: they are about the tokens of another tokenizer, or another chat template put them elsewhere.
    """
    import numpy as np

    info = read_info(responses)
    for what, ours, theirs, remedy in (
        ("tokenizer", tokenizer_digest, info.tokenizer_digest, "use objective=responses"),
        ("chat template", template_digest, info.template_digest, "give the student the teacher's chat_template.jinja"),
    ):
        if ours is not None and ours != theirs:
            raise ModelError(
                f"the logits in {responses} were kept with {what} {theirs[:12]}, the student has {ours[:12]}, so they "
                f"are not about the same tokens; {remedy}"
            )
    _check_sizes(responses, info)
    if info.num_rows != num_rows:
        raise ArtifactError(
            f"the logits in {responses} are of {info.num_rows} rows, and do not fit its {num_rows} rows; run "
            "generate_responses again"
        )
    row_starts = np.load(responses / ROW_STARTS, mmap_mode="r")
    if row_starts.shape != (num_rows + 1,) or row_starts[0] != 0 or row_starts[-1] != info.num_tokens:
        raise ArtifactError(f"{responses / ROW_STARTS} does not fit {DESCRIPTION}; run generate_responses again")
    dtype = record_dtype(info.k)
    empty = np.zeros(0, dtype)  # a file of no bytes cannot be mapped
    records = np.memmap(responses / RECORDS, dtype=dtype, mode="r") if info.num_tokens else empty
    return CachedLogits(info, records, row_starts)


def read_info(directory: Path) -> LogitsInfo:
    """What kept logits mean.

    Raises:
        ArtifactError: there are none, or not all of them.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        state = "has half-written logits" if (directory / RECORDS).exists() else "holds no logits"
        raise ArtifactError(
            f"{directory} {state}; run generate_responses with logits_top_k=64, or distill with teacher_logits=online"
        )
    with explain_os_errors(path):
        text = path.read_bytes()
    try:
        return LogitsInfo.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise ArtifactError(f"{path}: {where}: {first['msg']}; run generate_responses again") from None


def _check_sizes(directory: Path, info: LogitsInfo) -> None:
    """Compare the files' sizes with what the description says; a damaged copy is shorter."""
    expected = {
        RECORDS: info.num_tokens * record_dtype(info.k).itemsize,
        ROW_STARTS: NPY_HEADER_BYTES + 8 * (info.num_rows + 1),
    }
    for name, size in expected.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise ArtifactError(
                f"{path} {state}, {DESCRIPTION} says {size:,} bytes; copy the artifact again, or run "
                "generate_responses again"
            )


def merge_cached_logits(parts: Sequence[Path], directory: Path) -> LogitsInfo:
    """Write the logits of `parts`, one behind the other, to `directory`; copies bytes, and reads none into memory.

    Raises:
        ArtifactError: a part has none, or is damaged; or the parts were not kept alike.
        ValueError: there are no parts.
    """
    if not parts:
        raise ValueError("no parts to merge")
    infos = [read_info(part) for part in parts]
    first = infos[0]
    for part, info in zip(parts, infos, strict=True):
        _check_sizes(part, info)
        alike = info.model_copy(update={"num_rows": first.num_rows, "num_tokens": first.num_tokens})
        if alike != first:
            names = [name for name, value in alike if value != getattr(first, name)]
            raise ArtifactError(
                f"the logits in {part} and {parts[0]} differ in {', '.join(names)}; generate all shards with the same "
                "settings and teacher"
            )
    with CachedLogitsWriter(directory, first) as writer:
        for part, info in zip(parts, infos, strict=True):
            writer.append_part(part, info)
    return read_info(directory)
