"""Settings of generate_responses."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from slmops.tasks.config import CheckSettings
from slmops.teachers.config import FIRST_TEACHER, TeacherSettings


class GenerateResponsesConfig(CheckSettings, TeacherSettings):
    """One or several teachers answer the prompts of a dataset."""

    task_settings: dict[str, Any] = Field(default={})
    """Settings of tasks by the task's name, such as {"classification": {"labels": ["yes", "no"]}}."""
    max_rows: int = Field(default=1_000_000, ge=1)
    """Answer at most this many prompts: the first ones, in the dataset's (shuffled) order."""
    num_shards: int = Field(default=1, ge=1, le=1000)
    """Parts of equal size that the prompts are divided into."""
    shard: int = Field(default=0, ge=0, le=999)
    """The part that is answered, from 0."""
    max_new_tokens: int = Field(default=256, ge=1, le=32768)
    """Longest answer in tokens; an answer that is cut off there is left out and counted."""
    decoding: Literal["greedy", "sample"] = "greedy"
    """`greedy`: the likeliest token; `sample`: drawn with temperature and top_p."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Temperature of sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this much of the probability."""
    num_samples: int = Field(default=1, ge=1, le=64)
    """Answers asked for each prompt, of which one is kept; more than one needs decoding=sample."""
    choose_by: Literal["first", "agreement", "judge"] = "first"
    """Which is kept: the `first` that passes the checks, by `agreement` of most, or what a `judge` rates highest."""
    min_agreement_fraction: float = Field(default=0.0, ge=0, le=1)
    """With choose_by=agreement: drop a prompt if a smaller share of its answers agrees, 0 to 1."""
    judge: str = Field(default=FIRST_TEACHER, min_length=1)
    """Name of the teacher that judges, with choose_by=judge."""
    min_success_fraction: float = Field(default=0.98, ge=0, le=1)
    """The step fails if a smaller share of the prompts than this gets an answer, 0 to 1."""
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """Alternatives per answer token asked of an endpoint and kept as it gives them; 0 asks for none."""
    logits_top_k: int = Field(default=0, ge=0, le=1024)
    """Log-probabilities kept per answer token of a model that runs here; 0 keeps none."""
    logits_temperature: float = Field(default=1.0, gt=0, le=20)
    """Temperature at which they are kept; distillation from them runs at the same one."""

    @model_validator(mode="after")
    def _greedy_ignores_nothing(self) -> Self:
        if self.decoding == "greedy":
            if self.temperature != 1.0 or self.top_p != 1.0:
                raise ValueError("temperature and top_p need decoding=sample")
            if self.num_samples > 1:
                raise ValueError(f"num_samples needs decoding=sample: greedy answers are alike, got {self.num_samples}")
        if self.num_samples == 1 and self.choose_by != "first":
            raise ValueError(f"choose_by={self.choose_by} needs num_samples of 2 or more, got 1")
        if self.min_agreement_fraction and self.choose_by != "agreement":
            raise ValueError(f"min_agreement_fraction needs choose_by=agreement, got {self.choose_by}")
        return self

    @model_validator(mode="after")
    def _shard_is_one_of_them(self) -> Self:
        if self.shard >= self.num_shards:
            raise ValueError(f"shard must be less than num_shards={self.num_shards}, got {self.shard}")
        return self

    @model_validator(mode="after")
    def _teachers_can_do_it(self) -> Self:
        names = [spec.name for spec in self.teachers()]
        if self.choose_by == "judge" and self.judge not in names:
            raise ValueError(f"judge must name one of the teachers ({', '.join(names)}), got {self.judge}")
        # An endpoint gives text, and alternatives by their text: no distribution over a tokenizer's tokens.
        if self.logits_top_k and any(spec.kind == "endpoint" for spec in self.teachers() if spec.weight):
            raise ValueError(
                f"logits_top_k needs teachers that run here: an endpoint gives text, got {self.logits_top_k}"
            )
        return self
