"""Layers of the student that learn to be like layers of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel

from slmops.errors import ConfigError
from slmops.training.batches import Batch
from slmops.training.head import at_targets


def layer_map(chosen: Sequence[int], num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """The teacher's layer, counted from 0, for each of the student's; without `chosen` they are spread evenly.

    Layer i of S is set beside layer (i + 1) T / S - 1 of T, so that last stands beside last (TinyBERT, Jiao et al.
    2020, arXiv:1909.10351).

    Raises:
        ConfigError: `chosen` does not fit.
    """
    if not chosen:
        return [round((i + 1) * num_teacher_layers / num_student_layers) - 1 for i in range(num_student_layers)]
    if len(chosen) != num_student_layers or min(chosen) < 0 or max(chosen) >= num_teacher_layers:
        raise ConfigError(
            f"layer_map must name one of the teacher's layers 0 to {num_teacher_layers - 1} for each of the student's "
            f"{num_student_layers} layers, got {list(chosen)}"
        )
    return list(chosen)


class Matching(torch.nn.Module):
    """Losses between layers, with projections that are learned beside the student and dropped with it done."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        *,
        chosen_layers: Sequence[int],
        hidden_weight: float,
        attention_weight: float,
    ) -> None:
        super().__init__()
        ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
        self.layers = layer_map(chosen_layers, ours.num_hidden_layers, theirs.num_hidden_layers)
        self.hidden_weight, self.attention_weight = hidden_weight, attention_weight
        if hidden_weight:
            self.widen = torch.nn.ModuleList(_identity(ours, theirs) for _ in self.layers)
        if attention_weight:
            start = torch.eye(theirs.num_attention_heads, ours.num_attention_heads)
            repeated = torch.arange(theirs.num_attention_heads) * ours.num_attention_heads // theirs.num_attention_heads
            start[torch.arange(len(start)), repeated] = 1.0
            self.mix = torch.nn.ParameterList(torch.nn.Parameter(4.0 * start) for _ in self.layers)
            for model in (student, teacher):
                model.set_attn_implementation("eager")  # the others do not tell where they look
        self.to(student.device)

    @property
    def options(self) -> dict[str, bool]:
        """What both models are to return besides their last hidden states."""
        return {"output_hidden_states": bool(self.hidden_weight), "output_attentions": bool(self.attention_weight)}

    def loss(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        """The weighted sum over the N positions of `batch`, of two models' outputs."""
        total = torch.zeros((), device=batch.input_ids.device)
        for number, theirs in enumerate(self.layers):
            if self.hidden_weight:
                ours = at_targets(student.hidden_states[number + 1], batch)
                wanted = at_targets(teacher.hidden_states[theirs + 1], batch)
                total = total + self.hidden_weight * hidden_distance(self.widen[number](ours), wanted)
            if self.attention_weight:
                found = attention_at_targets(student.attentions[number], batch)
                wanted = attention_at_targets(teacher.attentions[theirs], batch)
                total = total + self.attention_weight * attention_distance(found, wanted, self.mix[number])
        return total / len(self.layers)


def hidden_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance of hidden states [N, d] relative to the teacher's squared length, summed over positions.

    TinyBERT's loss (Jiao et al. 2020, arXiv:1909.10351, equation 8), made free of scale: a few dimensions of a
    decoder's states are hundreds of times as large as others, and layers differ.
    """
    student, teacher = student.float(), teacher.float()
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1)).sum()


def attention_distance(student: torch.Tensor, teacher: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) between where heads look, mean over heads, summed over positions, in nats.

    MiniLM's loss (Wang et al. 2020, arXiv:2002.10957, equation 4). Where the models differ in heads, each of the
    teacher's is set beside a mixture of the student's.

    Args:
        student: probabilities, [N, h, L].
        teacher: probabilities, [N, H, L].
        mix: logits of the mixtures, [H, h].
    """
    mixed = torch.einsum("Hh,nhl->nHl", mix.float().softmax(-1), student.float()).clamp_min(1e-9)
    return F.kl_div(mixed.log(), teacher.float(), reduction="sum") / len(mix)


def attention_at_targets(attention: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[N, H, L] of [B, H, L, L]: where the positions look from which a target is predicted."""
    return at_targets(attention.transpose(1, 2), batch)


def _identity(ours: PretrainedConfig, theirs: PretrainedConfig) -> torch.nn.Linear:
    linear = torch.nn.Linear(ours.hidden_size, theirs.hidden_size, bias=False)
    torch.nn.init.eye_(linear.weight)
    return linear
