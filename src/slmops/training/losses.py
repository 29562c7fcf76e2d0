"""Losses as pure functions of logits: N positions, V tokens, k kept tokens. Each is a sum over positions, in nats."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of `target_ids` [N] under `logits` [N, V]."""
    return F.cross_entropy(logits, target_ids, reduction="sum")


def forward_kl(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) at `temperature`, times its square (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        logits: the student's, [N, V].
        teacher_logits: the teacher's, [N, V].
        temperature: divides both; the square keeps the gradient's size independent of it.
    """
    student = F.log_softmax(logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def forward_kl_top_k(
    logits: torch.Tensor,
    top_ids: torch.Tensor,
    top_log_probs: torch.Tensor,
    tail_log_prob: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """`forward_kl` from the teacher's k likeliest tokens, all others counted as one more outcome with the tail's mass.

    By the log-sum inequality it is a lower bound of `forward_kl`, and equal to it for k = V. Without the tail, a
    student would be free to put mass on tokens that the teacher ruled out.

    Args:
        logits: the student's, [N, V].
        top_ids: the teacher's likeliest tokens, [N, k].
        top_log_probs: their log-probabilities at `temperature`, [N, k].
        tail_log_prob: log of the mass of all other tokens at `temperature`, [N]; -inf where there is none.
        temperature: the one that the teacher's figures were taken at.
    """
    student = F.log_softmax(logits / temperature, dim=-1)
    top = (top_log_probs.exp() * (top_log_probs - student.gather(-1, top_ids))).sum()
    if top_ids.shape[-1] == logits.shape[-1]:
        return top * temperature**2
    student_tail = student.scatter(-1, top_ids, float("-inf")).logsumexp(-1)
    known_tail = tail_log_prob.clamp(min=torch.finfo(torch.float32).min)  # 0 * -inf is not a number
    tail = (known_tail.exp() * (known_tail - student_tail)).sum()
    return (top + tail) * temperature**2
