"""Settings of synthesize."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from slmops.tasks.config import CheckSettings
from slmops.teachers.config import TeacherSettings

NO_DOCUMENTS = "none"


class SynthesizeConfig(CheckSettings, TeacherSettings):
    """A teacher writes prompts, from seeds or from documents, and answers them."""

    method: Literal["self_instruct", "documents"] = "self_instruct"
    """`self_instruct`: new prompts after seeds; `documents`: questions on passages, with answers that stand in them."""
    num_rows: int = Field(default=1000, ge=1, le=10_000_000)
    """Stop at this many rows; fewer if max_requests or the documents end first."""
    max_requests: int = Field(default=10_000, ge=1)
    """Ask the teacher for new prompts, or about a passage, at most this often."""
    documents_uri: str = Field(default=NO_DOCUMENTS, min_length=1)
    """For method=documents: a .txt, .md or .jsonl file, or a folder of them; a local path or s3://bucket/key."""
    text_field: str = Field(default="text", min_length=1)
    """Field of a .jsonl document's rows that holds the text."""
    passage_chars: int = Field(default=1500, ge=100, le=100_000)
    """Longest passage in characters; passages end at a paragraph where they can, else at a sentence."""
    passage_overlap_chars: int = Field(default=200, ge=0)
    """How much of a passage, at most, the next one repeats, in characters."""
    questions_per_passage: int = Field(default=3, ge=1, le=50)
    """Questions that are asked for at once about one passage."""
    max_seeds: int = Field(default=10_000, ge=1, le=1_000_000)
    """Use at most this many seeds: the first ones."""
    examples_per_request: int = Field(default=6, ge=1, le=50)
    """Seeds that the teacher is shown at once."""
    prompts_per_request: int = Field(default=8, ge=1, le=50)
    """New prompts that it is asked for at once."""
    min_prompt_chars: int = Field(default=8, ge=1)
    """Drop shorter new prompts and questions, in characters."""
    max_prompt_chars: int = Field(default=2000, ge=1)
    """Drop longer ones."""
    novelty_threshold: float = Field(default=0.7, ge=0.1, le=1)
    """Drop a new prompt whose ROUGE-L F1 with a seed or an earlier prompt is this high; 1 drops only the same words."""
    task_settings: dict[str, Any] = Field(default={})
    """Settings of tasks by name: `{"classification": {"labels": ["yes", "no"]}}`."""
    max_new_tokens: int = Field(default=1024, ge=1, le=32768)
    """Longest answer in tokens, also of a list of new prompts."""
    decoding: Literal["greedy", "sample"] = "sample"
    """`greedy`: the likeliest token; `sample`: drawn with temperature and top_p."""
    temperature: float = Field(default=0.7, gt=0, le=10)
    """Temperature of sampling."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample from the likeliest tokens that hold this much of the probability."""

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        if self.passage_overlap_chars * 2 > self.passage_chars:
            raise ValueError(
                f"passage_overlap_chars must be at most half of passage_chars, got {self.passage_overlap_chars} of "
                f"{self.passage_chars}"
            )
        if self.min_prompt_chars > self.max_prompt_chars:
            raise ValueError(
                f"min_prompt_chars must not exceed max_prompt_chars, got {self.min_prompt_chars} and "
                f"{self.max_prompt_chars}"
            )
        if (self.documents_uri != NO_DOCUMENTS) != (self.method == "documents"):
            raise ValueError(
                f"documents_uri goes with method=documents, got {self.documents_uri!r} with method={self.method}"
            )
        return self
