"""Recipes of finetune_to_edge: each function here that returns a Recipe is one, by its name."""

from slmops_pipelines.recipes import distill_to_edge
from slmops_pipelines.recipes.sections import EdgeRecipe


class Recipe(EdgeRecipe):
    """A fine-tuned model, quantized."""


def default() -> Recipe:
    """For a base model that is small enough for its devices; the savings asked for are those of quantizing alone."""
    return Recipe().changed({"gate": {"min_latency_saved": 0.5, "min_memory_saved": 0.5}})


def demo() -> Recipe:
    """For SmolLM2-135M and short commands on two CPU cores."""
    return default().changed(_shared(distill_to_edge.demo()))


def smoke() -> Recipe:
    """For a tiny random model: it proves the plumbing and nothing else, so the gate asks for nothing."""
    smoke = distill_to_edge.smoke()
    return default().changed(_shared(smoke) | {"gate": smoke.gate.model_dump()})


def _shared(recipe: EdgeRecipe) -> dict[str, object]:
    """The sections that both pipelines set alike."""
    return recipe.model_dump(include={"prepare_data", "finetune", "evaluate", "benchmark"})
