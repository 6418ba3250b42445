from __future__ import annotations

import pytest
import torch

from specdec.kernels.scoring import Scoring
from specdec.model.grid import MANY_ROWS, fused_attention, product_attention


@pytest.mark.parametrize("tokens", [1, 3])
def test_kernels_of_half_precision_agree_with_float32(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(MANY_ROWS, 3, 2, tokens, 64, generator=generator)
    keys, values = (torch.randn(MANY_ROWS, 3, 96, 64, generator=generator) for _ in range(2))
    hidden = torch.rand(MANY_ROWS, tokens, 80, generator=generator) < 0.2
    mask = torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, float("-inf"))[:, None]
    half = [x.bfloat16() for x in (q, keys, values)]
    reached = [x[:, :, :80] for x in (keys, values, *half[1:])]  # of a longer cache
    expected = product_attention(q, reached[0], reached[1], mask, Scoring(0.125))
    for kernel in (product_attention, fused_attention):
        got = kernel(half[0], reached[2], reached[3], mask, Scoring(0.125))
        assert got.dtype == torch.bfloat16
        assert (got - expected).abs().max() < 0.03
