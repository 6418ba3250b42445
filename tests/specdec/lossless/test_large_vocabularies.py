"""Drawing from distributions over as many tokens as models have."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import Tensor

from specdec.lossless import sampling
from specdec.lossless.sampling import (
    BLOCK,
    Draw,
    block_masses,
    exponential,
    exponential_noise,
    sample,
    uniform,
)
from tests.specdec.goodness import FALSE_ALARM

WIDE = 151_936


def random_logits(rows: int, vocab: int, spread: float, seed: int) -> Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def flat_tail(mass: float) -> Tensor:
    """float32 [1, WIDE]: all but `mass` on one token in the middle, the rest spread evenly."""
    p = torch.full((1, WIDE), mass / (WIDE - 1), dtype=torch.float64)
    p[0, WIDE // 2] = 1 - mass
    return p.float()


SHAPES = {
    "peaked": torch.softmax(random_logits(1, WIDE, 4.0, seed=1), -1),
    "wide": torch.softmax(random_logits(1, WIDE, 1.0, seed=2), -1),
    "even": torch.full((1, WIDE), 1 / WIDE),
    "tail of 1%": flat_tail(0.01),
    "tail of 1e-4": flat_tail(1e-4),
    "not in whole blocks": torch.softmax(random_logits(1, 50_257, 3.0, seed=3), -1),
    "less than a block": torch.softmax(random_logits(1, 7, 1.0, seed=4), -1),
}


def law(p: Tensor) -> Tensor:
    """float64 [V]: how much of [0, 1) gives each token, from the intervals of `sample`."""
    mass = block_masses(p)[0]
    own = torch.nn.functional.pad(p[0].double(), (0, BLOCK * len(mass) - p.shape[1]))
    within = own.view(-1, BLOCK)
    total = within.sum(-1, keepdim=True).clamp(min=1e-300)
    return ((mass / mass.sum())[:, None] * within / total).flatten()[: p.shape[1]]


def begins(p: Tensor, tokens: Tensor) -> Tensor:
    """float64 [m]: the least u at which `sample` gives one of `tokens` [m] or a later one."""
    low, high = torch.zeros(len(tokens)).double(), torch.ones(len(tokens)).double()
    for _ in range(54):
        middle = (low + high) / 2
        there = sample(p.expand(len(tokens), -1), middle) >= tokens
        low, high = torch.where(there, low, middle), torch.where(there, middle, high)
    return high


@pytest.mark.parametrize("shape", SHAPES)
def test_sample_has_the_exact_law_over_a_large_vocabulary(shape: str) -> None:
    """By enumeration of intervals. 24 bits and float32 sums were 5e-4 to 3e-3 away."""
    p = SHAPES[shape]
    exact = p[0].double() / p[0].double().sum()
    assert (law(p) - exact).abs().sum() / 2 < 1e-6
    # Of some tokens, the intervals are found by asking `sample`.
    tokens = torch.randint(p.shape[1] - 1, (48,), generator=torch.Generator().manual_seed(5))
    found = begins(p, tokens + 1) - begins(p, tokens)
    torch.testing.assert_close(found, law(p)[tokens], rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("mass", [0.01, 1e-4])
def test_each_token_of_a_flat_tail_behind_a_likely_one_is_drawn(mass: float) -> None:
    """A quarter of it never was: float32 sums near 1 do not see what is less than 6e-8."""
    p = flat_tail(mass)
    tokens = torch.randint(WIDE - 1, (64,), generator=torch.Generator().manual_seed(6))
    found = begins(p, tokens + 1) - begins(p, tokens)
    torch.testing.assert_close(found, p[0, tokens].double(), rtol=1e-3, atol=0)


def test_uniform_numbers_are_less_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the largest hash there is, and the smallest."""
    zero = torch.zeros(2, dtype=torch.int64)
    monkeypatch.setattr(sampling, "_key", lambda *_: torch.tensor([-1, 0]))
    assert uniform(zero, zero, Draw.ACCEPT).tolist() == [1 - 2.0**-53, 0.0]


def noise_of(rank: Tensor) -> Tensor:
    """float64: the noise of each 63-bit number: its upper 31 bits, then its lower 32."""
    upper = rank >> 32
    x, y = upper.int(), ((rank & 0xFFFFFFFF) - 2**31).int()
    return exponential(x, y, torch.empty_like(x)).double()


def rank_of(noise: Tensor) -> Tensor:
    """int64: the least 63-bit number whose noise is more than this."""
    low, high = torch.zeros(len(noise)).long(), torch.full((len(noise),), 2**63 - 1)
    for _ in range(64):
        middle = low + (high - low) // 2
        more = noise_of(middle) > noise
        low, high = torch.where(more, low, middle + 1), torch.where(more, middle, high)
    return high


def test_noise_is_exponential_down_to_the_least_likely_token() -> None:
    """P(E < e) by enumeration: a token of p has to draw less than about p to win a race."""
    e = torch.tensor([1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-5, 0.1, 1, 8], dtype=torch.float64)
    below = rank_of(e).double() * 2.0**-63
    torch.testing.assert_close(below, -torch.expm1(-e), rtol=1e-4, atol=0)


def test_noise_is_never_0_nor_infinite() -> None:
    ends = noise_of(torch.tensor([0, 1, 2**63 - 2, 2**63 - 1]))
    assert ((ends > 0) & (ends < 17)).all()


def test_hardly_any_race_over_a_large_vocabulary_is_a_tie() -> None:
    """Over even tokens the winner draws about 1 / V: the next number is nearer than 1e-6 of it.

    With 31 bits it was 7e-5 away, and so many races went to the first of two tokens.
    """
    e = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64) / WIDE
    here = rank_of(e)
    there = rank_of(noise_of(here))
    assert (noise_of(there) / noise_of(here) < 1 + 1e-6).all()
    keys = torch.arange(20)
    two = exponential_noise(keys, keys, WIDE).topk(2, largest=False).values
    assert (two[:, 0] < two[:, 1]).all()


@pytest.mark.statistical
def test_the_fraction_of_small_noise_is_uniform() -> None:
    """KS of the bits that only small numbers show, about 2,700 of 20 million; false alarm 1e-6."""
    parts = []
    for seed in range(13):
        noise = exponential_noise(torch.full((10,), seed), torch.arange(10), WIDE).double()
        parts.append(-torch.expm1(-noise[noise < 2.0**-13]) * 2.0**31)
    assert stats.kstest((torch.cat(parts) % 1).numpy(), "uniform").pvalue > FALSE_ALARM
