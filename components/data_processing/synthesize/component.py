"""KFP interface of synthesize."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output
from slmops_components.documented import documented

from slmops.synthesize.config import SynthesizeConfig


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
@documented(SynthesizeConfig)
def synthesize(
    rows: Output[Dataset],
    seeds: Input[Dataset] = None,
    teacher: Input[Model] = None,
    teacher_kind: str = "model",
    endpoint_url: str = "http://localhost:8000/v1",
    endpoint_model: str = "default",
    endpoint_api: str = "chat",
    teacher_weight: float = 1.0,
    teacher_tasks: list[str] = [],  # noqa: B006
    more_teachers: list[dict] = [],  # noqa: B006
    batch_size: int = 128,
    dtype: str = "auto",
    max_in_flight: int = 64,
    request_timeout_s: float = 600.0,
    max_retries: int = 8,
    max_total_tokens: int = 1_000_000_000,
    max_cost: float = 1000.0,
    prompt_price: float = 0.0,
    completion_price: float = 0.0,
    seed: int = 0,
    min_answer_chars: int = 1,
    max_answer_chars: int = 100_000,
    answer_pattern: str = "(?s).",
    forbidden_pattern: str = "(?!)",
    answer_schema: dict = {},  # noqa: B006
    drop_refusals: bool = True,
    refusal_phrases: list[str] = [],  # noqa: B006
    max_loops: int = 8,
    max_repeated_fraction: float = 0.5,
    answer_languages: list[str] = [],  # noqa: B006
    min_language_confidence: float = 0.9,
    method: str = "self_instruct",
    num_rows: int = 1000,
    max_requests: int = 10_000,
    documents_uri: str = "none",
    text_field: str = "text",
    passage_chars: int = 1500,
    passage_overlap_chars: int = 200,
    questions_per_passage: int = 3,
    max_seeds: int = 10_000,
    examples_per_request: int = 6,
    prompts_per_request: int = 8,
    min_prompt_chars: int = 8,
    max_prompt_chars: int = 2000,
    novelty_threshold: float = 0.7,
    task_settings: dict = {},  # noqa: B006
    max_new_tokens: int = 1024,
    decoding: str = "sample",
    temperature: float = 0.7,
    top_p: float = 0.95,
) -> None:
    """Let a teacher write new prompts and answer them: after examples, or about passages of documents.

    Args:
        rows: Chat records, each with its teacher and what it was made from.
        seeds: Chat records whose prompts are the examples of method=self_instruct; none with method=documents.
        teacher: The model that writes and answers, a Hugging Face directory; none with an endpoint.
    """
    from pathlib import Path

    from slmops.step import path_of, step
    from slmops.synthesize import config, run

    with step("synthesize"):
        sidecar = run.run(
            config.SynthesizeConfig.pick(locals()),
            seeds=path_of(seeds),
            teacher=path_of(teacher),
            rows=Path(rows.path),
        )
        rows.metadata.update(sidecar.metadata())
