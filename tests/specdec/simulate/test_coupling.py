"""Candidates drawn from the far end of speculative sampling have its law."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from specdec.lossless.sampling import SamplingBatch
from specdec.request import SamplingParams
from specdec.simulate.coupling import choices_given, reversed_coupling
from tests.specdec.goodness import chi_square_excess, counted


def test_the_reversed_coupling_has_the_law_of_rejection_sampling() -> None:
    vocab, n = 6, 200_000
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.rand(vocab, generator=generator) ** 3 for _ in range(2))
    p[4] = q[5] = 0.0  # tokens that only one of the two can draw
    p, q = p / p.sum(), q / q.sum()
    x = torch.multinomial(p.expand(n, -1), 1, generator=generator)[:, 0]
    u, v = (torch.rand(n, generator=generator) for _ in range(2))
    y = reversed_coupling(p.expand(n, -1), q.expand(n, -1), x, u, v)
    # The joint law of (committed, candidate): Leviathan et al., algorithm 1, written out.
    rejected = (q - p).clamp(min=0)
    joint = torch.diag(torch.minimum(p, q))
    joint += (p - q).clamp(min=0)[:, None] * rejected[None] / rejected.sum()
    assert joint.sum(0) == pytest.approx(q, abs=1e-6)
    assert joint.sum(1) == pytest.approx(p, abs=1e-6)
    # Fails by chance with probability FALSE_ALARM.
    assert chi_square_excess(counted(torch.stack([x, y], 1), vocab), joint) < 1


def test_equal_distributions_always_couple() -> None:
    p = torch.softmax(torch.randn(50, 9, generator=torch.Generator().manual_seed(0)), -1)
    x = p.argmin(-1)
    ones = torch.full((50,), 1 - 2.0**-24)
    assert torch.equal(reversed_coupling(p, p.clone(), x, ones, ones), x)


def recursive_rejection(p: Tensor, q: Tensor, width: int) -> Counter[tuple[int, ...]]:
    """Probability of (siblings drawn, committed), by enumeration: SpecInfer (arXiv 2305.09781)."""
    law: Counter[tuple[int, ...]] = Counter()

    def walk(p: Tensor, q: Tensor, drawn: list[int], chance: float, x: int | None) -> None:
        if len(drawn) == width:
            for v in range(len(p)):
                law[*drawn, v] += chance * (float(p[v]) if x is None else float(v == x))
            return
        for y in range(len(q)):
            if q[y] <= 0:
                continue
            rest = q.clone()
            rest[y] = 0.0
            rest /= rest.sum()
            stands = float((p[y] / q[y]).clamp(max=1)) if x is None else 0.0
            reached = chance * float(q[y])
            if stands:
                walk(p, rest, [*drawn, y], reached * stands, y)
            if stands < 1:
                left = (p - q).clamp(min=0) if x is None else p
                walk(left / left.sum(), rest, [*drawn, y], reached * (1 - stands), x)

    walk(p, q, [], 1.0, None)
    return law


def test_siblings_have_the_law_of_recursive_rejection() -> None:
    vocab, n, width = 4, 200_000, 3
    p = torch.tensor([0.5, 0.2, 0.25, 0.05])
    q = torch.tensor([0.2, 0.5, 0.1, 0.2])
    generator = torch.Generator().manual_seed(4)
    x = torch.multinomial(p, n, replacement=True, generator=generator)
    at = torch.arange(n)
    params = SamplingBatch.of([SamplingParams(4, 1.0, seed=1)], torch.device("cpu"))
    rows = params.rows(torch.zeros_like(at))
    y = choices_given(p.expand(n, -1), q.expand(n, -1), x, width, rows, at)
    law = torch.zeros([vocab] * (width + 1))
    for place, chance in recursive_rejection(p.double(), q.double(), width).items():
        law[place] = chance
    assert law.sum() == pytest.approx(1)
    # Fails by chance with probability FALSE_ALARM.
    assert chi_square_excess(counted(torch.cat([y, x[:, None]], 1), vocab), law) < 1


def test_where_the_draft_has_no_more_tokens_there_are_no_more_siblings() -> None:
    p, q = torch.tensor([[0.6, 0.4, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    at = torch.zeros(1, dtype=torch.int64)
    rows = SamplingBatch.of([SamplingParams(4, 1.0, seed=1)], torch.device("cpu")).rows(at)
    for x in (0, 1):
        y = choices_given(p, q, torch.tensor([x]), 3, rows, at)
        assert y.tolist() == [[1, -1, -1]]
