"""What a directory for ExecuTorch holds: one program, its tokenizer, and the settings that a runtime needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slmops import artifacts
from slmops.artifacts import Sha256
from slmops.errors import ModelError, explain_os_errors

SETTINGS = "executorch_config.json"
PROGRAM: Final = "model.pte"

Precision = Literal["float32", "int8", "int4"]
"""`int8`: weights with a scale for each row; `int4`: with one for each block. Activations of both are rounded to 8 bits
as they come up."""


class ExecuTorchSettings(BaseModel):
    """`executorch_config.json`. A field that this version does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    program: Literal["model.pte"] = PROGRAM
    program_size_bytes: int = Field(gt=0)
    program_sha256: Sha256
    executorch_version: str = Field(min_length=1, max_length=64)
    """What wrote the program."""
    architecture: str = Field(min_length=1, max_length=128)
    """Of the model that it was made from, such as LlamaForCausalLM."""
    precision: Precision
    block_size: int | None = Field(ge=32)
    """Weights that share a scale; None where there are no blocks."""
    context_length: int = Field(ge=2)
    """Tokens that the key-value cache has room for."""
    max_tokens_per_call: int = Field(ge=1)
    """Tokens that the program reads at once."""
    max_scored_per_call: int = Field(ge=1)
    """Positions whose logits it returns at once."""
    vocabulary_size: int = Field(ge=1)
    end_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """An answer ends before the first of them."""

    @model_validator(mode="after")
    def _fits_itself(self) -> ExecuTorchSettings:
        if not self.max_scored_per_call <= self.max_tokens_per_call <= self.context_length:
            raise ValueError("max_scored_per_call <= max_tokens_per_call <= context_length does not hold")
        if (self.precision == "int4") != (self.block_size is not None):
            raise ValueError("block_size belongs to int4, and to nothing else")
        if max(self.end_token_ids) >= self.vocabulary_size:
            raise ValueError("end_token_ids lie outside the vocabulary")
        return self


def is_executorch(directory: Path) -> bool:
    """Whether a variant's directory is for ExecuTorch."""
    return (directory / SETTINGS).is_file()


def read_settings(directory: Path) -> ExecuTorchSettings:
    """The settings of a directory, whose program is as it was written.

    The program is hashed, because ExecuTorch runs flipped weights without an error: 0.1 s for 100 MB.

    Raises:
        ArtifactError: there are none.
        ModelError: they are damaged or of another version, or the program is.
    """
    file = directory / SETTINGS
    with explain_os_errors(file):
        text = file.read_bytes()
    try:
        settings = ExecuTorchSettings.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise ModelError(f"{file}: {where}: {first['msg']}; run quantize again") from None
    program = directory / settings.program
    if not program.is_file():
        raise ModelError(f"{directory} has no {settings.program}; copy the variant again, or run quantize again")
    size_bytes = program.stat().st_size
    if size_bytes != settings.program_size_bytes:
        raise ModelError(
            f"{program} has {size_bytes:,} bytes where {SETTINGS} says {settings.program_size_bytes:,}; copy the "
            "variant again, or run quantize again"
        )
    if artifacts.file_digest(program) != settings.program_sha256:
        raise ModelError(
            f"{program} is not the program that {SETTINGS} names (another SHA-256); copy the variant again, or run "
            "quantize again"
        )
    return settings
