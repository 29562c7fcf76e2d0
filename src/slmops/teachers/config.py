"""Settings of one teacher among several."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slmops.config import Config

INPUT = "input"
"""What `model_uri` is if the teacher is the step's own input artifact."""


class TeacherSpec(Config):
    """What a teacher is, where it is, and what it is asked."""

    name: str = Field(default="teacher", pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")
    """What rows and counts call it."""
    kind: Literal["model", "genai", "vllm", "endpoint"] = "model"
    """`model`: a Hugging Face directory, by transformers; `vllm`: the same, by vLLM; `genai`: a directory of ONNX
    Runtime GenAI; `endpoint`: any server with the OpenAI API."""
    model_uri: str = Field(default=INPUT, min_length=1)
    """Its directory, a local path or s3://bucket/prefix; `input` for the step's input artifact. Not for endpoints."""
    endpoint_url: str = Field(default="http://localhost:8000/v1", pattern=r"^https?://[^\s@]+$")
    """Base address of the endpoint, such as https://host/v1."""
    endpoint_model: str = Field(default="default", min_length=1)
    """Its name at the endpoint; `default` takes whatever is served."""
    endpoint_api: Literal["chat", "completions"] = "chat"
    """`chat`: the server applies the chat template; `completions`: turns are joined as plain text."""
    weight: float = Field(default=1.0, ge=0, le=1000)
    """Its share of the prompts, relative to the other teachers; 0 for one that only judges."""
    tasks: list[str] = Field(default=[])
    """Tasks whose prompts it answers; empty for all that no other teacher names."""
