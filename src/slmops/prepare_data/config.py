"""Settings of prepare_data."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from slmops.config import Config

NO_TOKENIZER = "none"
"""What `tokenizer_uri` is if no tokens are counted."""


class PrepareDataConfig(Config):
    """From raw rows to chat records in three splits."""

    source_uri: str = Field(min_length=1)
    """A .jsonl, .json, .csv or .parquet file, also on s3://; a folder of them, or that `datasets` saved; hf://datasets/..."""
    source_version: str = Field(default="unknown", min_length=1)
    """The data's version, as preflight finds it; KFP's cache sees a new one, and with `unknown` only a new URI."""
    layout: Literal["auto", "messages", "sharegpt", "alpaca", "columns"] = "auto"
    """`messages`, `sharegpt`: a chat; `alpaca`: instruction, input, output; `columns`: templates; `auto`: by row 1."""
    prompt_template: str = Field(default="{prompt}", min_length=1)
    """The user's turn, with column names in braces."""
    completion_template: str = Field(default="{completion}", min_length=1)
    """The assistant's turn, with column names in braces."""
    system_prompt: str = ""
    """The system turn in front of each conversation that has none; empty for no such turn."""
    task: str = Field(default="chat", min_length=1)
    """The task that rows are marked with: how a teacher is asked, and when an answer is right."""
    task_column: str = Field(default="task", min_length=1)
    """The column that names a row's own task, where there is such a column."""
    pii: Literal["off", "redact", "drop"] = "redact"
    """Personal data (e-mail, phone, card, IBAN, IP): replaced by its kind, or the row set aside, or left in."""
    pii_names: bool = False
    """Whether names of people count as personal data; needs Presidio."""
    languages: list[str] = Field(default=[])
    """Codes such as en, de: rows that are surely in another language are set aside; empty for any language."""
    min_chars: int = Field(default=1, ge=1)
    """Rows whose turns together have fewer characters are set aside."""
    max_chars: int = Field(default=1_000_000, ge=1)
    """Rows whose turns together have more characters are set aside."""
    tokenizer_uri: str = Field(default=NO_TOKENIZER, min_length=1)
    """The student's model, a path or s3://bucket/prefix, whose tokenizer counts tokens; `none` counts none."""
    max_tokens: int = Field(default=1_000_000, ge=1)
    """Rows of more tokens are set aside; only with a tokenizer."""
    near_duplicates: Literal["off", "report", "remove"] = "report"
    """Rows that nearly say the same: not looked for, counted and kept in one split, or all but one set aside."""
    near_duplicate_threshold: float = Field(default=0.8, ge=0.5, le=0.95)
    """Rows are near duplicates from this Jaccard similarity of their runs of five words, 0.5 to 0.95."""
    split_by: Literal["seed", "column", "none"] = "seed"
    """`seed`: by chance, stratified; `column`: by a column with train, validation or test; `none`: all are test."""
    split_column: str = Field(default="split", min_length=1)
    """The column that `split_by=column` reads; files of a folder that are named by split have it without having it."""
    stratify_by: str = Field(default="completion", min_length=1)
    """Keep the shares of this column's values in every split; `completion` for the assistant's text, `none` for off."""
    group_by: str = Field(default="none", min_length=1)
    """Rows with the same value of this column stay in one split, such as those of one customer; `none` for off."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of the rows for validation, 0 to 0.5."""
    test_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the rows for test, 0 to 0.5."""
    leakage: Literal["off", "report", "remove"] = "remove"
    """Train rows whose prompt shares a run of words with a row of validation or test: ignored, counted, set aside."""
    leakage_ngram: int = Field(default=13, ge=5, le=100)
    """Words in a run that counts as leaked, 5 to 100; a shorter prompt counts if all of it is alike."""
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
        if self.min_chars > self.max_chars:
            raise ValueError("min_chars must not be above max_chars")
        return self
