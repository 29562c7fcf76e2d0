"""Losses as pure functions: N positions, V tokens, M outcomes, k kept tokens. Each is a sum over positions, in nats.

A divergence compares two distributions over the same outcomes, given as log-probabilities [N, M]: all tokens, or the
`outcomes` of a few kept tokens and the rest. Any function of that form can stand in for those here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the student's and the teacher's log-probabilities [N, M] to a sum over positions."""


def cross_entropy(logits: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of `target_ids` [N] under `logits` [N, V]."""
    return F.cross_entropy(logits, target_ids, reduction="sum")


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student), which wants mass wherever the teacher has some (Hinton et al. 2015, arXiv:1503.02531)."""
    return F.kl_div(student, _finite(teacher), reduction="sum", log_target=True)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher), which wants none where the teacher has none (Gu et al. 2024, arXiv:2306.08543)."""
    return F.kl_div(_finite(teacher), student, reduction="sum", log_target=True)


def jensen_shannon(student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2024, arXiv:2306.13649, equation 1).

    beta KL(teacher || m) + (1 - beta) KL(student || m), where m = beta teacher + (1 - beta) student. Its gradient tends
    to that of `forward_kl` as beta tends to 0, and of `reverse_kl` as it tends to 1, both times a factor that vanishes.

    Args:
        student: log-probabilities, [N, M].
        teacher: log-probabilities, [N, M].
        beta: the teacher's share, between 0 and 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, got {beta}; at the ends, take forward_kl or reverse_kl")
    teacher = _finite(teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher = F.kl_div(mixture, teacher, reduction="sum", log_target=True)
    of_student = F.kl_div(mixture, student, reduction="sum", log_target=True)
    return beta * of_teacher + (1 - beta) * of_student


def log_probs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of all tokens at `temperature`; [N, V] as `logits`."""
    return F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def outcomes(logits: torch.Tensor, top_ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of k tokens and, last, of all others together, [N, k + 1]; for k = V, of all tokens, [N, V].

    A divergence between such outcomes is at most the one between all tokens (data processing inequality), and equal to
    it for k = V. Without the rest, a student would be free to put mass on tokens that the teacher ruled out.

    Args:
        logits: [N, V].
        top_ids: tokens that differ within a row, [N, k].
        temperature: divides the logits.
    """
    if top_ids.shape[-1] == logits.shape[-1]:
        return log_probs(logits, temperature).gather(-1, top_ids)
    result: torch.Tensor = _Outcomes.apply(logits, top_ids, temperature)
    return result


class _Outcomes(torch.autograd.Function):
    """`outcomes` with one pass over the vocabulary in each direction, where autograd would make five."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, top_ids: torch.Tensor, temperature: float) -> torch.Tensor:
        scaled = logits.clone() if temperature == 1.0 else logits / temperature
        top = scaled.gather(-1, top_ids)
        # The rest is summed by itself: 1 less the top's mass would have no digits left where the rest is small.
        rest = scaled.scatter_(-1, top_ids, float("-inf")).logsumexp(-1, keepdim=True)
        total = torch.logaddexp(top.logsumexp(-1, keepdim=True), rest)
        found = torch.cat([top, rest], -1) - total
        scaled.scatter_(-1, top_ids, top)
        ctx.save_for_backward(scaled, top_ids, total, found)
        ctx.temperature = temperature
        return found.clamp_min(torch.finfo(found.dtype).min)  # 0 * -inf is not a number

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        scaled, top_ids, total, found = ctx.saved_tensors
        # Of a token j: its outcome's gradient times its share of the outcome, less its probability times all gradients.
        all_of_it = gradient.sum(-1, keepdim=True)
        mass = found.exp()
        in_top = gradient[:, :-1] - mass[:, :-1] * all_of_it
        rest = (gradient[:, -1:] / mass[:, -1:].clamp_min(torch.finfo(mass.dtype).tiny)) - all_of_it
        result = scaled.sub(total).exp_().mul_(rest).scatter_(-1, top_ids, in_top)
        return (result if ctx.temperature == 1.0 else result.div_(ctx.temperature)), None, None


def _finite(log_probabilities: torch.Tensor) -> torch.Tensor:
    """What has no mass at all keeps none, with a logarithm that can be multiplied by 0."""
    return log_probabilities.clamp_min(torch.finfo(log_probabilities.dtype).min)
