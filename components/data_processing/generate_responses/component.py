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
    max_rows: int = 1_000_000,
    max_new_tokens: int = 256,
    decoding: str = "greedy",
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 32,
    logits_top_k: int = 0,
    logits_temperature: float = 1.0,
    dtype: str = "auto",
    seed: int = 0,
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
