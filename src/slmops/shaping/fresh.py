"""A student with random weights: the architecture and vocabulary of a larger model, in other sizes."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from slmops.shaping.architecture import make_model, resized
from slmops.shaping.plan import StudentPlan, head_dim_of_student, sizes_of_student


def fresh_student(
    kind: type[PreTrainedModel], config: PreTrainedConfig, plan: StudentPlan, seed: int
) -> PreTrainedModel:
    """A model of `kind` with the sizes of `plan`, on the CPU in float32; it needs no weights of the larger one.

    Its weights are those that transformers' own initialiser draws from `seed`, the same on each machine. A size of the
    attention heads that is hidden_size / num_attention_heads in `config` is so again, any other is kept.

    Raises:
        ModelError: transformers refuses these sizes.
    """
    known = config.to_dict()
    changes = sizes_of_student(plan, known)
    if known.get("head_dim"):
        changes["head_dim"] = head_dim_of_student(plan, known)
    return make_model(kind, resized(config, changes), seed=seed, device="cpu")
