"""Recipes of endpoint_to_edge: each function here that returns a Recipe is one, by its name."""

from typing import ClassVar

from slmops_pipelines.recipes import finetune_to_edge
from slmops_pipelines.recipes.sections import EdgeRecipe, GenerateSection


class EndpointSection(GenerateSection):
    """generate_responses; where the endpoint is is a run-time parameter."""

    endpoint_url: ClassVar[str] = "http://localhost:8000/v1"  # type: ignore[misc]  # a class variable is no field


class Recipe(EdgeRecipe):
    """A model that is fine-tuned on what a teacher behind an endpoint answers, quantized."""

    generate_responses: EndpointSection = EndpointSection(teacher_kind="endpoint", max_new_tokens=1024)
    """Which model to ask, and how much at once."""


def default() -> Recipe:
    """For any endpoint and a base model that is small enough for its devices."""
    return Recipe().changed(finetune_to_edge.default().model_dump())


def smoke() -> Recipe:
    """For a tiny random model at both ends: it proves the plumbing and nothing else, so the gate asks for nothing."""
    return default().changed(
        finetune_to_edge.smoke().model_dump() | {"generate_responses": {"max_rows": 32, "max_new_tokens": 40}}
    )


def deepseek_v3_to_phi4_mini() -> Recipe:
    """DeepSeek-V3, served by vLLM, teaches Phi-4-mini-instruct (3.8B) by QLoRA on one H100."""
    return default().changed(
        finetune_to_edge.phi4_mini_qlora_1xh100().model_dump()
        | {
            "generate_responses": {
                "endpoint_model": "deepseek-ai/DeepSeek-V3",
                "max_new_tokens": 2048,
                "max_in_flight": 64,
            }
        }
    )
