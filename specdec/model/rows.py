"""Rows of tokens laid end to end: which tokens go to which slot and position."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Row = tuple[int, int]
"""(slot, number of tokens to append to it)."""


class PackedRow(NamedTuple):
    """A row's packed tokens [begin, begin + tokens), which go to `slot` from position `start`."""

    begin: int
    tokens: int
    slot: int
    start: int


def packed_rows(lengths: Sequence[int], rows: Sequence[Row]) -> list[PackedRow]:
    """Rows laid end to end, each behind the `lengths[slot]` tokens that its slot has."""
    ends = accumulate(count for _, count in rows)
    return [
        PackedRow(end - count, count, slot, lengths[slot])
        for (slot, count), end in zip(rows, ends, strict=True)
    ]


def cut_rows(table: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """A table of packed rows [R, 4], cut into such of at most `most` tokens."""
    counts = table[:, 1]
    parts = -(-counts // most)
    before = most * (np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts))
    table = np.repeat(table, parts, axis=0)
    table[:, 1] = np.minimum(table[:, 1] - before, most)
    table[:, [0, 3]] += before[:, None]
    return table


def upload(device: torch.device, *lists: Sequence[int]) -> tuple[Tensor, ...]:
    """Each list as int64 on the device, all in one transfer."""
    sizes = [len(numbers) for numbers in lists]
    # By way of numpy, since torch takes eight times as long for a list: 0.3 ms for 2,000 numbers.
    flat = torch.from_numpy(np.fromiter(chain.from_iterable(lists), np.int64, sum(sizes)))
    return torch.split(flat.to(device, non_blocking=True), sizes)
