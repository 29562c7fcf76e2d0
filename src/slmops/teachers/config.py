"""Settings of teachers: which, with what, for how much."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from slmops.config import Config

INPUT = "input"
"""What `model_uri` is if the teacher is the step's own input artifact."""
FIRST_TEACHER = "teacher"
"""Name of the teacher that `teacher_kind` and `endpoint_*` describe."""


class TeacherSpec(Config):
    """What a teacher is, where it is, and what it is asked."""

    name: str = Field(default="teacher", pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")
    """What rows and counts call it."""
    kind: Literal["model", "genai", "vllm", "endpoint"] = "model"
    """`model`: by transformers; `vllm`: by vLLM; `genai`: by ONNX Runtime; `endpoint`: a server with OpenAI API."""
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


class TeacherSettings(Config):
    """Teachers of a step, what they may use, and what they may cost."""

    teacher_kind: Literal["model", "genai", "vllm", "endpoint"] = "model"
    """`model`: by transformers; `vllm`: by vLLM; `genai`: by ONNX Runtime; `endpoint`: a server with OpenAI API."""
    endpoint_url: str = Field(default="http://localhost:8000/v1", pattern=r"^https?://[^\s@]+$")
    """Base address of the endpoint, such as https://host/v1."""
    endpoint_model: str = Field(default="default", min_length=1)
    """The teacher's name at the endpoint; `default` takes whatever is served."""
    endpoint_api: Literal["chat", "completions"] = "chat"
    """`chat`: the server applies the chat template; `completions`: turns are joined as plain text."""
    teacher_weight: float = Field(default=1.0, ge=0, le=1000)
    """This teacher's share of the prompts, relative to `more_teachers`; 0 if it only judges."""
    teacher_tasks: list[str] = Field(default=[])
    """Tasks whose prompts it answers; empty for all that no other teacher names."""
    more_teachers: list[TeacherSpec] = Field(default=[])
    """Teachers beside the first, which is called `teacher`: name, kind, model_uri or endpoint_*, weight, tasks."""
    batch_size: int = Field(default=128, ge=1, le=4096)
    """Prompts that a model answers together; fewer where memory does not suffice."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 where the hardware multiplies it natively, else float32."""
    max_in_flight: int = Field(default=64, ge=1, le=4096)
    """Requests on their way to an endpoint at once."""
    request_timeout_s: float = Field(default=600.0, gt=0, le=86400)
    """Longest wait for one answer of an endpoint in seconds; a long answer of a large teacher takes minutes."""
    max_retries: int = Field(default=8, ge=0, le=100)
    """How often one request to an endpoint is repeated, with growing pauses, or as long as it asks to wait."""
    max_total_tokens: int = Field(default=1_000_000_000, ge=1)
    """Budget of all endpoints together, in tokens of prompts and answers; answers kept from earlier runs are free."""
    max_cost: float = Field(default=1000.0, gt=0)
    """The same in money, in the currency of the two prices."""
    prompt_price: float = Field(default=0.0, ge=0)
    """Price of a million prompt tokens."""
    completion_price: float = Field(default=0.0, ge=0)
    """Price of a million answer tokens."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling, and of the mixture of teachers."""

    def teachers(self) -> list[TeacherSpec]:
        """All of them, the first one first."""
        first = TeacherSpec(
            name=FIRST_TEACHER,
            kind=self.teacher_kind,
            endpoint_url=self.endpoint_url,
            endpoint_model=self.endpoint_model,
            endpoint_api=self.endpoint_api,
            weight=self.teacher_weight,
            tasks=self.teacher_tasks,
        )
        return [first, *self.more_teachers]

    @model_validator(mode="after")
    def _teachers_have_names(self) -> Self:
        names = [spec.name for spec in self.teachers()]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"more_teachers: names must differ from each other and from teacher, got {sorted(doubled)}"
            )
        if not any(spec.weight for spec in self.teachers()):
            raise ValueError("at least one teacher must have a weight above 0")
        return self
