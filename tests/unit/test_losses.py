"""The losses against plain references, finite differences and known limits."""

from __future__ import annotations

import pytest
import torch

from slmops.training.losses import cross_entropy, forward_kl, forward_kl_top_k

POSITIONS, VOCABULARY = 5, 11


def logits(seed: int) -> torch.Tensor:
    return torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top_k(teacher: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What generate_responses keeps of a teacher's logits."""
    log_probs = torch.log_softmax(teacher / temperature, -1)
    top, ids = log_probs.topk(k, -1)
    return ids, top, log_probs.scatter(-1, ids, float("-inf")).logsumexp(-1)


def test_cross_entropy_is_the_sum_of_negative_log_likelihoods() -> None:
    student, targets = logits(0), torch.arange(POSITIONS)
    expected = -sum(torch.log_softmax(student[at], -1)[at] for at in range(POSITIONS))
    assert cross_entropy(student, targets).item() == pytest.approx(float(expected))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_forward_kl_agrees_with_its_definition(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    p = torch.softmax(teacher / temperature, -1)
    q = torch.softmax(student / temperature, -1)
    expected = (p * (p.log() - q.log())).sum() * temperature**2
    assert forward_kl(student, teacher, temperature).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_kept_is_the_full_divergence(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    kept = forward_kl_top_k(student, *top_k(teacher, VOCABULARY, temperature), temperature)
    assert kept.item() == pytest.approx(forward_kl(student, teacher, temperature).item())


def test_fewer_tokens_are_a_lower_bound_that_rises_with_k() -> None:
    student, teacher = logits(0), logits(1)
    values = [forward_kl_top_k(student, *top_k(teacher, k, 1.0), 1.0).item() for k in range(1, VOCABULARY + 1)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(forward_kl(student, teacher, 1.0).item())


@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(k: int) -> None:
    teacher = logits(1)
    student = teacher.clone().requires_grad_()
    loss = forward_kl_top_k(student, *top_k(teacher, k, 2.0), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert student.grad is not None
    assert student.grad.abs().max().item() == pytest.approx(0.0, abs=1e-12)


def test_mass_outside_the_kept_tokens_costs() -> None:
    """Without the tail's term, a student could move mass to tokens that the teacher ruled out at no cost."""
    teacher = torch.tensor([[10.0, 9.0, -20.0, -20.0]], dtype=torch.float64)
    student = torch.tensor([[10.0, 9.0, 9.0, -20.0]], dtype=torch.float64)
    assert forward_kl_top_k(student, *top_k(teacher, 2, 1.0), 1.0).item() > 0.2


@pytest.mark.parametrize("k", [3, VOCABULARY])
def test_gradients_agree_with_finite_differences(k: int) -> None:
    student = logits(0).requires_grad_()
    kept = top_k(logits(1), k, 2.0)
    assert torch.autograd.gradcheck(lambda value: forward_kl_top_k(value, *kept, 2.0), (student,))


def test_a_tail_without_mass_gives_finite_gradients() -> None:
    student = logits(0).requires_grad_()
    ids, top, tail = top_k(logits(1), 3, 1.0)
    forward_kl_top_k(student, ids, top, torch.full_like(tail, float("-inf")), 1.0).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
