"""Settings of lm_evaluate."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from slmops.config import Config


class LmEvaluateConfig(Config):
    """Which tasks of lm-evaluation-harness a model does, and how it is asked."""

    tasks: list[str] = Field(min_length=1)
    """Names of tasks, groups or tags, of lm_eval or of task files of your own; `mmlu_*` takes all that fit."""
    target: Literal["model", "endpoint"] = "model"
    """`model`: the input artifact; `endpoint`: a server with OpenAI's API, and no input artifact."""
    variant: str = Field(default="full_precision", pattern=r"^[a-z0-9_-]+$")
    """`full_precision` for a Hugging Face directory, else the name of a quantized variant such as `cpu-int4`."""
    fewshot: Literal["task", "fixed"] = "task"
    """Worked examples before each question: `task`: as many as the task says; `fixed`: num_fewshot of them."""
    num_fewshot: int = Field(default=0, ge=0, le=100)
    """Worked examples, with fewshot=fixed. A task whose own file says 0 keeps its 0."""
    max_rows: int = Field(default=1_000_000, ge=1)
    """Use at most this many rows of each task: the first ones."""
    max_length: int = Field(default=2048, ge=16, le=1_000_000)
    """Longest sequence in tokens, at most what the model takes; longer prompts lose their beginning."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """Longest answer in tokens, where a task does not say."""
    apply_chat_template: bool = False
    """Ask in the model's chat format, few-shot examples as turns; an endpoint with the chat API always does."""
    batch_size: int = Field(default=8, ge=1, le=4096)
    """Sequences computed together, where the runtime batches; each takes length x vocabulary x 4 bytes and more."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Compute type of a Hugging Face directory; a quantized variant has its own."""
    endpoint_url: str = Field(default="http://localhost:8000/v1", pattern=r"^https?://[^\s@]+$")
    """Base address of the endpoint, such as https://host/v1."""
    endpoint_model: str = Field(default="default", min_length=1)
    """The model's name at the endpoint; `default` takes whatever is served."""
    endpoint_api: Literal["chat", "completions"] = "chat"
    """`chat`: answers only; `completions`: also log-probabilities of given text, where the server has them (vLLM)."""
    endpoint_tokenizer: str = Field(default="served", min_length=1)
    """Counts tokens for log-probabilities: `served`: the endpoint's own (/tokenizer_info); else a model directory."""
    max_in_flight: int = Field(default=16, ge=2, le=4096)
    """Requests on their way to the endpoint at once."""
    request_timeout_s: float = Field(default=600.0, ge=1, le=86400)
    """Longest wait for one answer of the endpoint in seconds."""
    max_retries: int = Field(default=8, ge=0, le=100)
    """How often one request to the endpoint is repeated, with growing pauses."""
    allow_code: bool = False
    """Run code that task files name (`!function`) or that models write (tasks marked unsafe, such as humaneval)."""
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    """Seed of the choice of few-shot examples, of sampling and of resampling."""

    @field_validator("tasks")
    @classmethod
    def _are_names(cls, tasks: list[str]) -> list[str]:
        if files := [name for name in tasks if not name or "/" in name]:
            raise ValueError(f"tasks go by their names, got {files}; put task files into the input task_files")
        return tasks

    @model_validator(mode="after")
    def _examples_count(self) -> Self:
        if self.num_fewshot and self.fewshot == "task":
            raise ValueError(f"num_fewshot: {self.num_fewshot} counts only with fewshot=fixed; set that too")
        return self
