"""Keys and values in eight bits: numbers of one byte, and a scale for each position and head.

What is stored for a token depends on that token alone. So its bytes are the same whether it was
prefilled, decoded or verified, wherever its page lies, and whoever shares it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

KvDtype = Literal["auto", "fp8", "int8"]
"""Number formats of stored keys and values; "auto": the model's own."""

DTYPES: dict[KvDtype, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""What the formats of eight bits are to torch."""

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""What the largest number of a head becomes."""

LEAST = 1e-20
"""Smallest number that a scale is made for, so that a head of zeros has one."""


class Scales(NamedTuple):
    """The scales of a layer's keys and of its values, float32 [pages, Hkv, PAGE] each."""

    keys: Tensor
    values: Tensor


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers [..., D] of a dtype of LARGEST, and their scales float32 [...].

    >>> numbers, scales = quantise(torch.tensor([[0.0, -2.54, 1.0]]), torch.int8)
    >>> numbers.tolist(), round(scales.item(), 4)
    ([[0, -127, 50]], 0.02)
    """
    wide = x.float()
    scales = wide.abs().amax(-1).clamp(min=LEAST) * (1 / LARGEST[dtype])
    numbers = wide / scales[..., None]
    if not dtype.is_floating_point:
        numbers = (numbers + 0.5).floor_()
    return numbers.to(dtype), scales


def dequantise(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What numbers [..., D] with scales [...] stand for, rounded to a dtype once."""
    return numbers.to(dtype).mul_(scales[..., None])
