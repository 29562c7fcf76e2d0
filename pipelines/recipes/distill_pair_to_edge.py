"""Recipes of distill_pair_to_edge: each function here that returns a Recipe is one, by its name.

Teacher and student of one family share tokenizer and chat template, so the student can learn from logits. Where they do
not, the step says so before anything is loaded, and `distill.objective=responses` is the way.
"""

from slmops_pipelines.placement import GpuProfile, Placement
from slmops_pipelines.recipes import distill_to_edge
from slmops_pipelines.recipes.sections import H100, DistillRecipe, on


class Recipe(DistillRecipe):
    """A fine-tuned teacher, and a student that starts from a checkpoint of its own."""


def default() -> Recipe:
    """For any two models with one tokenizer, and a GPU of any kind."""
    return Recipe(placement=Placement(gpu=GpuProfile()))


def smoke() -> Recipe:
    """For two tiny random models: it proves the plumbing and nothing else, so the gate asks for nothing."""
    return default().changed(
        distill_to_edge.smoke().model_dump() | {"distill": {"num_epochs": 2, "dtype": "float32", "keep_layers": []}}
    )


def smollm2_1_7b_to_360m_1xl4() -> Recipe:
    """SmolLM2-1.7B-Instruct teaches SmolLM2-360M-Instruct on one L4."""
    changes = {"learning_rate": 1e-4, "micro_batch_size": 8, "keep_layers": []}
    validations = {"num_validations": 10, "max_validation_rows": 500, "keep_weights": "best"}
    layers_of_one = distill_to_edge.smollm2_distill_1xl4()
    return default().changed(layers_of_one.changed({"distill": changes | validations}).model_dump())


def qwen3_8b_to_0_6b_1xh100() -> Recipe:
    """Qwen3-8B teaches Qwen3-0.6B on one H100: half of the steps on the student's own answers at the end (GKD)."""
    return default().changed(
        {
            "finetune": {
                "num_epochs": 1,
                "learning_rate": 1e-4,
                "batch_size": 64,
                "micro_batch_size": 4,
                "max_length": 4096,
                "activation_checkpointing": True,
                "checkpoint_interval_s": 600,
            },
            "generate_responses": {"max_new_tokens": 1024, "batch_size": 64, "logits_top_k": 0},
            "distill": {
                "teacher_logits": "online",
                "divergence": "jensen_shannon",
                "divergence_settings": {"beta": 0.5},
                "on_policy_end": 0.5,
                "max_answer_tokens": 512,
                "num_epochs": 2,
                "learning_rate": 5e-5,
                "batch_size": 64,
                "micro_batch_size": 8,
                "max_length": 4096,
                "num_validations": 10,
                "max_validation_rows": 500,
                "keep_weights": "best",
                "checkpoint_interval_s": 600,
            },
            "evaluate": {"max_new_tokens": 1024, "max_rows": 1000},
        }
        | on(H100, model_memory_gib=40)
    )


def llama_3_1_8b_to_3_2_1b_1xh100() -> Recipe:
    """Llama-3.1-8B-Instruct teaches Llama-3.2-1B-Instruct on one H100, from cached logits.

    The two have one tokenizer; give the student the teacher's chat_template.jinja, which the step asks for.
    """
    return qwen3_8b_to_0_6b_1xh100().changed(
        {
            "generate_responses": {"logits_top_k": 64},
            "distill": {
                "teacher_logits": "cached",
                "divergence": "forward_kl",
                "divergence_settings": {},
                "on_policy_end": 0.0,
                "hard_label_weight": 0.1,
            },
        }
    )
