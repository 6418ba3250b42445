from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.policies import signals as module
from specdec.policies.base import HEAD_SIGNALS, TOKEN_SIGNALS, Signal
from specdec.policies.signals import AcceptanceHead, ResidualBlock, read_signals
from tests.specdec.workloads import random_head

WANTED = frozenset(TOKEN_SIGNALS)


@pytest.fixture(params=["compiled", "torch"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals are read by a compiled kernel where there is one."""
    if request.param == "torch":
        monkeypatch.setattr(module, "kernels_over", lambda _: None)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("shift", "dtype", "atol"),
    [(0.0, torch.float32, 1e-6), (1000.0, torch.float32, 1e-3), (0.0, torch.bfloat16, 0.01)],
)
def test_signals_of_a_known_distribution(shift: float, dtype: torch.dtype, atol: float) -> None:
    """Logits are free up to a constant; 1/2, 1/4, 1/8, 1/8 has an entropy of 7/4 ln 2."""
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]] * 3)
    logits = (p.log() + shift).to(dtype)
    signals = read_signals(logits, torch.tensor([0, 1, 3]), torch.zeros(3, 4), WANTED)

    def near(column: Signal, wanted: torch.Tensor) -> None:
        torch.testing.assert_close(signals[:, column], wanted, atol=atol, rtol=0.0)

    near(Signal.LOG_Q, torch.tensor([0.5, 0.25, 0.125]).log())
    near(Signal.LOG_TOP, torch.full((3,), 0.5).log())
    near(Signal.ENTROPY, torch.full((3,), 1.75 * np.log(2)))


@pytest.mark.usefixtures("either_way")
def test_entropy_of_random_flat_and_certain_distributions() -> None:
    random = 5 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    flat, certain = torch.zeros(1, 1000), torch.zeros(1, 1000)
    certain[0, 7] = 200.0
    logits = torch.cat([random, flat, certain])
    entropy = read_signals(
        logits, torch.zeros(52).long(), torch.zeros(52, 1), frozenset({Signal.ENTROPY})
    )[:, Signal.ENTROPY]
    log_p = logits.double().log_softmax(-1)
    expected = -(log_p.exp() * log_p).sum(-1).float()
    torch.testing.assert_close(entropy, expected, atol=1e-4, rtol=1e-5)
    assert entropy[-1] == 0 and entropy[-2] == pytest.approx(np.log(1000), rel=1e-6)


@pytest.mark.usefixtures("either_way")
def test_a_candidate_drawn_against_all_odds_has_finite_signals() -> None:
    logits = torch.tensor([[0.0, -500.0, -torch.inf]] * 3)
    for token in (1, 2):
        signals = read_signals(logits, torch.full((3,), token), torch.zeros(3, 1), WANTED)
        assert torch.isfinite(signals).all() and (signals[:, Signal.LOG_Q] < -80).all()
        assert not signals[:, Signal.ENTROPY].any()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("wanted", [set(), {Signal.LOG_Q}, {Signal.LOG_TOP, Signal.ENTROPY}])
def test_signals_that_nobody_wants_are_zero(wanted: set[Signal]) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    signals = read_signals(logits, torch.arange(4), torch.zeros(4, 2), frozenset(wanted))
    assert signals.shape == (4, len(Signal))
    assert {column for column in Signal if signals[:, column].any()} == wanted


@pytest.mark.usefixtures("either_way")
def test_the_heads_signals_are_its_debiased_logits() -> None:
    head = random_head(8)
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([3, 1, 4, 1])
    token_signals = read_signals(logits, tokens, hidden, WANTED)[:, : len(TOKEN_SIGNALS)]
    signals = read_signals(logits, tokens, hidden, HEAD_SIGNALS, head)
    judged = signals[:, [Signal.HEAD_BEFORE, Signal.HEAD_AFTER]]
    torch.testing.assert_close(judged, head(hidden, token_signals) + np.log(head.reject_weight))


# ---------------------------------------------------------------------------------- head


def test_the_heads_blocks_have_weights_of_their_own() -> None:
    """A mistake seen in public code: `[block] * n` repeats one module n times."""
    head = AcceptanceHead(8, depth=3)
    assert len(head.blocks) == 3
    places = [p.data_ptr() for block in head.blocks for p in block.parameters()]
    assert len(set(places)) == len(places) == 6
    first, second, _ = head.blocks
    assert isinstance(first, ResidualBlock) and isinstance(second, ResidualBlock)
    with torch.no_grad():
        first.linear.weight.fill_(1.0)
    assert not second.linear.weight.any()


def test_a_new_head_is_linear_in_the_hidden_state() -> None:
    head = AcceptanceHead(8, depth=3)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head.blocks(x), x)
    assert head(x, torch.zeros(5, 3)).shape == (5, 2)


def test_a_block_adds_silu_of_a_linear_layer() -> None:
    head = random_head(8)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    block = head.blocks[0]
    assert isinstance(block, ResidualBlock)
    y = x @ block.linear.weight.T + block.linear.bias
    torch.testing.assert_close(block(x), x + y / (1 + (-y).exp()))


@pytest.mark.parametrize("weight", [1.0, 2.0, 6.0, 30.0])
def test_debiasing_inverts_what_the_training_weights_do(weight: float) -> None:
    """Weighting rejections by w turns P into P / (P + w (1 - P))."""
    p = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)
    biased = p / (p + weight * (1 - p))
    head = AcceptanceHead(1, depth=0, reject_weight=weight).double()
    with torch.no_grad():
        for layer in (head.before, head.after):
            layer.weight.zero_()[0, 0] = 1.0
            layer.bias.zero_()
    trained = biased.logit()[:, None]  # a head that has learnt the biased odds by heart
    none = torch.zeros(5, 3, dtype=torch.float64)
    torch.testing.assert_close(head(trained, none).sigmoid(), biased[:, None].expand(-1, 2))
    torch.testing.assert_close(head.debiased(trained, none).sigmoid(), p[:, None].expand(-1, 2))
