"""The losses against plain references, finite differences and known limits."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from slmops.training.losses import (
    Divergence,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    log_probs,
    outcomes,
    reverse_kl,
)

POSITIONS, VOCABULARY = 5, 11
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "jensen_shannon 0.1": partial(jensen_shannon, beta=0.1),
}

every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top_k(teacher: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of a teacher's logits: ids [N, k], log-probabilities of them and of the rest [N, k + 1]."""
    found = torch.log_softmax(teacher / temperature, -1)
    top, ids = found.topk(k, -1)
    rest = found.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return ids, torch.cat([top, rest], -1)


def test_cross_entropy_is_the_sum_of_negative_log_likelihoods() -> None:
    student, targets = logits(0), torch.arange(POSITIONS)
    expected = -sum(torch.log_softmax(student[at], -1)[at] for at in range(POSITIONS))
    assert cross_entropy(student, targets).item() == pytest.approx(float(expected))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_divergences_agree_with_their_definitions(temperature: float) -> None:
    q, p = (torch.softmax(logits(seed) / temperature, -1) for seed in (0, 1))
    student, teacher = (log_probs(logits(seed), temperature) for seed in (0, 1))
    mixture = 0.3 * p + 0.7 * q
    assert forward_kl(student, teacher).item() == pytest.approx((p * (p / q).log()).sum().item())
    assert reverse_kl(student, teacher).item() == pytest.approx((q * (q / p).log()).sum().item())
    expected = 0.3 * (p * (p / mixture).log()).sum() + 0.7 * (q * (q / mixture).log()).sum()
    assert jensen_shannon(student, teacher, beta=0.3).item() == pytest.approx(expected.item())


def test_jensen_shannon_tends_to_either_divergence_at_its_ends() -> None:
    student, teacher = log_probs(logits(0), 1.0), log_probs(logits(1), 1.0)
    near_0, near_1 = (jensen_shannon(student, teacher, beta=beta).item() for beta in (1e-6, 1 - 1e-6))
    assert near_0 / 1e-6 == pytest.approx(forward_kl(student, teacher).item(), rel=1e-3)
    assert near_1 / 1e-6 == pytest.approx(reverse_kl(student, teacher).item(), rel=1e-3)
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="take forward_kl or reverse_kl"):
            jensen_shannon(student, teacher, beta=beta)


@every_divergence
def test_all_tokens_kept_is_the_full_divergence(name: str) -> None:
    ids, teacher = top_k(logits(1), VOCABULARY, 2.0)
    kept = DIVERGENCES[name](outcomes(logits(0), ids, 2.0), teacher[:, :-1])
    full = DIVERGENCES[name](log_probs(logits(0), 2.0), log_probs(logits(1), 2.0))
    assert kept.item() == pytest.approx(full.item())


@every_divergence
def test_fewer_tokens_are_a_lower_bound_that_rises_with_k(name: str) -> None:
    values = []
    for k in range(1, VOCABULARY):
        ids, teacher = top_k(logits(1), k, 1.0)
        values.append(DIVERGENCES[name](outcomes(logits(0), ids, 1.0), teacher).item())
    assert values == sorted(values)
    assert values[-1] == pytest.approx(DIVERGENCES[name](log_probs(logits(0), 1.0), log_probs(logits(1), 1.0)).item())


@every_divergence
@pytest.mark.parametrize("k", [1, 4])
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(name: str, k: int) -> None:
    student = logits(1).requires_grad_()
    ids, teacher = top_k(logits(1), k, 2.0)
    loss = DIVERGENCES[name](outcomes(student, ids, 2.0), teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.abs().max().item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
def test_outcomes_are_log_probabilities_of_the_tokens_and_of_the_rest(k: int, temperature: float) -> None:
    student = logits(0)
    ids, _ = top_k(logits(1), k, temperature)
    before = student.clone()
    found = outcomes(student, ids, temperature)
    p = torch.softmax(student / temperature, -1)
    rest = p.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
    expected = p.gather(-1, ids) if k == VOCABULARY else torch.cat([p.gather(-1, ids), rest], -1)
    torch.testing.assert_close(found.exp(), expected)
    torch.testing.assert_close(student, before, rtol=0, atol=0)


def test_a_rest_too_small_for_a_difference_is_still_known() -> None:
    """1 less the top's probability has no digits left here."""
    student = torch.tensor([[0.0, -60.0, -61.0]])
    found = outcomes(student, torch.tensor([[0]]), 1.0)
    assert found[0, 1].item() == pytest.approx(-60.0 + torch.tensor(-1.0).exp().log1p().item(), rel=1e-5)


def test_mass_outside_the_kept_tokens_costs() -> None:
    """Without the rest, a student could move mass to tokens that the teacher ruled out at no cost."""
    ids, teacher = top_k(torch.tensor([[10.0, 9.0, -20.0, -20.0]], dtype=torch.float64), 2, 1.0)
    student = torch.tensor([[10.0, 9.0, 9.0, -20.0]], dtype=torch.float64)
    assert forward_kl(outcomes(student, ids, 1.0), teacher).item() > 0.2


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_agree_with_finite_differences(name: str, temperature: float) -> None:
    ids, kept = top_k(logits(1), 3, temperature)
    full = log_probs(logits(1), temperature)
    student = logits(0).requires_grad_()
    divergence = DIVERGENCES[name]
    assert torch.autograd.gradcheck(lambda value: divergence(outcomes(value, ids, temperature), kept), (student,))
    assert torch.autograd.gradcheck(lambda value: divergence(log_probs(value, temperature), full), (student,))


@every_divergence
def test_a_teacher_without_mass_somewhere_gives_finite_gradients(name: str) -> None:
    student = logits(0).float().requires_grad_()
    ids, teacher = top_k(logits(1).float(), 3, 1.0)
    teacher[:, -1] = float("-inf")
    (gradient,) = torch.autograd.grad(DIVERGENCES[name](outcomes(student, ids, 1.0), teacher), student)
    assert torch.isfinite(gradient).all()
