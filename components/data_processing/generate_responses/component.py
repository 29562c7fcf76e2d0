"""KFP interface of generate_responses."""

import slmops_images as images
from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output
from slmops_components.documented import documented

from slmops.generate_responses.config import GenerateResponsesConfig


@dsl.component(base_image=images.TRAIN, install_kfp_package=False)
@documented(GenerateResponsesConfig)
def generate_responses(
    prompts: Input[Dataset],
    responses: Output[Dataset],
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
    task_settings: dict = {},  # noqa: B006
    max_rows: int = 1_000_000,
    num_shards: int = 1,
    shard: int = 0,
    max_new_tokens: int = 256,
    decoding: str = "greedy",
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    choose_by: str = "first",
    min_agreement_fraction: float = 0.0,
    judge: str = "teacher",
    min_success_fraction: float = 0.98,
    top_logprobs: int = 0,
    logits_top_k: int = 0,
    logits_temperature: float = 1.0,
) -> None:
    """Let a teacher answer the prompts of a dataset.

    Args:
        prompts: Chat records; their last turn is not shown to the teacher.
        teacher: The model that answers, a Hugging Face directory; none with an endpoint.
        responses: The teacher's answers, and its distribution over tokens if asked for.
    """
    from pathlib import Path

    from slmops.generate_responses import config, run
    from slmops.step import path_of, step

    with step("generate_responses"):
        sidecar = run.run(
            config.GenerateResponsesConfig.pick(locals()),
            prompts=Path(prompts.path),
            teacher=path_of(teacher),
            responses=Path(responses.path),
        )
        responses.metadata.update(sidecar.metadata())
