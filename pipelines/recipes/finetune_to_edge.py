"""Recipes of finetune_to_edge: each function here that returns a Recipe is one, by its name."""

from slmops_pipelines.recipes import distill_to_edge
from slmops_pipelines.recipes.sections import H100, EdgeRecipe, asking_for_nothing, on


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
    return default().changed(_shared(distill_to_edge.smoke()) | asking_for_nothing())


def phi4_mini_qlora_1xh100() -> Recipe:
    """Phi-4-mini-instruct (3.8B) by QLoRA on one H100, for devices with 8 GB of memory."""
    return default().changed(
        {
            "finetune": {
                "method": "qlora",
                "num_epochs": 2,
                "learning_rate": 1e-4,
                "batch_size": 64,
                "micro_batch_size": 8,
                "max_length": 4096,
                "lora_rank": 32,
                "lora_alpha": 64,
                "lora_dropout": 0.05,
                "checkpoint_interval_s": 600,
            },
            "evaluate": {"max_new_tokens": 1024, "batch_size": 32, "max_rows": 1000},
            "benchmark": {"max_new_tokens": 256, "num_requests": 20},
        }
        # The whole model in float32, twice, while adapters are merged or a variant is built: 3.8e9 parameters.
        | on(H100, model_memory_gib=40)
    )


def _shared(recipe: EdgeRecipe) -> dict[str, object]:
    """The sections that both pipelines set alike."""
    return recipe.model_dump(include={"prepare_data", "finetune", "quantize", "evaluate", "benchmark"})
