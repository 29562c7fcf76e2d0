"""Settings of prepare_data."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from slmops.config import Config


class PrepareDataConfig(Config):
    """From raw rows to chat records in three splits."""

    source_uri: str = Field(min_length=1)
    """A .jsonl, .csv or .parquet file: a local path or s3://bucket/key."""
    source_version: str = Field(default="unknown", min_length=1)
    """The file's version, as preflight finds it; KFP's cache sees a new one, and with `unknown` only a new URI."""
    layout: Literal["auto", "messages", "columns"] = "auto"
    """`messages`: rows hold a chat; `columns`: templates make one; `auto`: `messages` if the first row has that key."""
    prompt_template: str = Field(default="{prompt}", min_length=1)
    """The user's turn, with column names in braces."""
    completion_template: str = Field(default="{completion}", min_length=1)
    """The assistant's turn, with column names in braces."""
    system_prompt: str = ""
    """The system turn in front of each conversation that has none; empty for no such turn."""
    split_by: Literal["seed", "column"] = "seed"
    """`seed`: by chance, stratified; `column`: by a column that holds train, validation or test."""
    split_column: str = Field(default="split", min_length=1)
    """The column that `split_by=column` reads."""
    stratify_by: str = Field(default="completion", min_length=1)
    """Keep the shares of this column's values in every split; `completion` for the assistant's text, `none` for off."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the rows for validation, 0 to 0.5."""
    test_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the rows for test, 0 to 0.5."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """The step fails if more than this share of the rows is bad, 0 to 1."""
    max_rows: int = Field(default=1_000_000, ge=10)
    """Read at most this many rows; more is an error, so that nothing is dropped in silence."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split."""

    @model_validator(mode="after")
    def _leaves_rows_to_train(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 0.9:
            raise ValueError("validation_fraction and test_fraction together must leave more than 0.1 to train")
        return self
