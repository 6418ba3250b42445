from __future__ import annotations

import pytest
import torch

from specdec.training.loss import distill_loss
from specdec.training.trainer import rate


def test_loss_of_the_documented_example() -> None:
    q = torch.tensor([[0.5, 0.25, 0.2, 0.05]])
    loss = distill_loss(
        q.log(), torch.tensor([1]), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]]), 0.0
    )
    assert loss.item() == pytest.approx(0.0101, abs=1e-4)
    with_ce = distill_loss(
        q.log(), torch.tensor([1]), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]]), 2.0
    )
    assert with_ce.item() - loss.item() == pytest.approx(-2 * torch.tensor(0.25).log().item())


def test_loss_over_a_whole_vocabulary_is_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p_logits = torch.randn(5, 11, generator=generator)
    q_logits = torch.randn(5, 11, generator=generator, requires_grad=True)
    p = torch.softmax(p_logits, -1)
    top = p.topk(11)
    loss = distill_loss(q_logits, torch.zeros(5).long(), top.indices, top.values, 0.0)
    log_q = torch.log_softmax(q_logits, -1)
    expected = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
    assert torch.allclose(loss, expected, atol=2e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), q_logits)
    assert torch.allclose(gradient, log_q.exp() - p, atol=1e-4)


def test_loss_of_certainty_is_finite() -> None:
    """A target and a draft without a doubt, in agreement and not."""
    logits = torch.tensor([[80.0, 0.0, 0.0], [0.0, 80.0, 0.0]], requires_grad=True)
    ids, probs = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = distill_loss(logits, torch.tensor([0, 0]), ids, probs, 0.1)
    assert loss[0].item() == pytest.approx(0, abs=1e-5)
    assert loss[1].item() == pytest.approx(88, rel=0.01)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(i / 200) for i in range(1, 201)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == 1
    assert rates[-1] == pytest.approx(0.02)
