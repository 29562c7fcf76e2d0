"""Settings of preflight."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from slmops.config import Config

NO_ENDPOINT = "none"
"""What `teacher_endpoint` is if no endpoint is asked."""


class PreflightConfig(Config):
    """What a pipeline is about to use, and what it asks for."""

    data_uri: str = Field(min_length=1)
    """What prepare_data will read: a file, a folder, s3://bucket/key or hf://datasets/owner/name."""
    base_model_uri: str = Field(min_length=1)
    """The model to start from, a Hugging Face directory: a local path or s3://bucket/prefix."""
    store_uri: str = Field(min_length=1)
    """Where releases will go: s3://bucket/prefix, or a local folder."""
    same_tokenizer_uris: list[str] = Field(default=[])
    """More models whose tokenizer must equal the base model's, such as a student that learns from its logits."""
    teacher_endpoint: str = Field(default=NO_ENDPOINT, pattern=r"^(none|https?://[^\s@]+)$")
    """Base URL of an OpenAI-compatible server that must answer, such as http://teacher:8000/v1; `none` for none."""
    require_license: bool = False
    """Whether a base model whose licence is not found is refused; else it is a warning in the report."""
    allowed_licenses: list[str] = Field(default=[])
    """SPDX identifiers, one of which the base model's licence must be; empty for any licence."""
    min_free_disk_gib: float = Field(default=2.0, ge=0)
    """Free space in GiB where steps keep unfinished work: $SLMOPS_WORK_DIR, a mounted volume, or beside the output."""
    min_free_memory_gib: float = Field(default=1.0, ge=0)
    """Free memory in GiB, within the container's limit."""
    min_gpus: int = Field(default=0, ge=0, le=1024)
    """GPUs that this step must see; 0 does not look for any."""
    min_gpu_memory_gib: float = Field(default=0.0, ge=0)
    """Memory of each of them in GiB."""

    @model_validator(mode="after")
    def _memory_is_of_a_gpu(self) -> Self:
        if self.min_gpu_memory_gib and not self.min_gpus:
            raise ValueError("min_gpu_memory_gib needs min_gpus of 1 or more, got 0")
        return self
