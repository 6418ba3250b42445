"""Heads of eight bits and what is left of them."""

from __future__ import annotations

import doctest

import pytest
import torch

from specdec.kernels import stored as module
from specdec.kernels.stored import LARGEST, dequantise, quantise


def test_the_example_in_the_docstring_is_right() -> None:
    failed, tried = doctest.testmod(module)
    assert tried >= 2 and not failed


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_numbers_are_rounded_to_the_nearest_step_of_their_head(dtype: torch.dtype) -> None:
    heads = torch.randn(200, 3, 64, generator=torch.Generator().manual_seed(0))
    heads *= torch.logspace(-6, 6, 200)[:, None, None]
    numbers, scales = quantise(heads, dtype)
    assert numbers.dtype == dtype and scales.shape == (200, 3)
    error = (dequantise(numbers, scales, torch.float32) - heads).abs() / scales[..., None]
    steps = heads.abs() / scales[..., None]
    # e4m3 has three bits behind the first, and steps of 2^-9 below 2^-6.
    half = torch.full_like(steps, 0.5)
    if dtype.is_floating_point:
        half = 2 ** (steps.clamp(min=2**-6).log2().floor() - 4)
    assert (error <= 1.001 * half).all()
    assert numbers.float().abs().amax(-1).eq(LARGEST[dtype]).all()


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_a_heads_bytes_depend_on_that_head_alone(dtype: torch.dtype) -> None:
    heads = torch.randn(9, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    numbers, scales = quantise(heads, dtype)
    alone, scale = quantise(heads[4:5, 1:], dtype)
    assert torch.equal(alone.float(), numbers[4:5, 1:].float())
    assert torch.equal(scale, scales[4:5, 1:])


@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_zeros_stay_and_what_is_no_number_does_not_become_one(dtype: torch.dtype) -> None:
    heads = torch.zeros(3, 16)
    heads[1, 3], heads[2, 5] = torch.inf, torch.nan
    zeros, infinite, nothing = dequantise(*quantise(heads, dtype), torch.float16)
    assert not zeros.any()
    assert not infinite.isfinite().any() and nothing.isnan().all()
