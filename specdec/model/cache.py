"""Keys and values of the rows in flight. This class alone owns their length, rollback and place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.base import LayerKernels
from specdec.kernels.choose import layer_kernels

KEY_BLOCK = 128
"""Capacities, and the lengths that batch-invariant attention reads, are multiples of this.

Raised, caches grow less often, and short rows pay for more positions that are empty.
"""


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """What one layer caches per position, and how much of it a token attends to.

    Attributes:
        heads, key_dim, value_dim: `heads` times key_dim and value_dim numbers per position.
        window: positions that a token looks back, itself included; None: all.
        chunked: whether it looks back no further than the last multiple of `window` (Llama 4).
        plain: whether this is all, and weights are the softmax of scores: what kernels compute.
    """

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    plain: bool = True
    chunked: bool = False

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries at some positions attend to keys at others; any shapes that broadcast."""
        seen = key <= query
        if self.window is not None:
            first = query - query % self.window if self.chunked else query - self.window + 1
            seen = seen & (key >= first)
        return seen


def round_to_blocks(positions: int) -> int:
    """The smallest multiple of KEY_BLOCK that holds `positions`."""
    return -(-positions // KEY_BLOCK) * KEY_BLOCK


class SlotCache:
    """A rectangle of `slots` x `capacity` positions per layer, with the length of each slot.

    Live rows occupy slots 0..n-1 without holes (the engine moves the last row into a hole), so
    attention reads the rectangle as a view and never gathers a slot. Unwritten positions are finite
    (zero or stale, see `scrub`) and masked.

    Attributes:
        lengths: per slot, how many positions hold the tokens of its row, or of the row that left it
            last.
        keys, values: per layer, [slots, heads, capacity, dim].
        generation: how often these tensors were replaced by others: what remembers their addresses
            is out of date when this changes.

    Args:
        use_kernels: whether hand-written kernels may work on it (specdec/kernels).
    """

    def __init__(
        self,
        layout: tuple[LayerLayout, ...],
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        use_kernels: bool = True,
    ) -> None:
        self.layout, self.dtype, self.device = layout, dtype, device
        self.slots, self.capacity = slots, round_to_blocks(capacity)
        self.lengths = [0] * slots
        self.keys = [self._zeros(layer.heads, layer.key_dim) for layer in layout]
        self.values = [self._zeros(layer.heads, layer.value_dim) for layer in layout]
        self.generation = 0
        self._use_kernels = use_kernels

    def _zeros(self, heads: int, dim: int) -> Tensor:
        shape = (self.slots, heads, self.capacity, dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @functools.cached_property
    def kernels(self) -> LayerKernels | None:
        """The kernels that can read this cache, if there are any and they are wanted."""
        if not self._use_kernels:
            return None
        sizes = {size for layer in self.layout for size in (layer.key_dim, layer.value_dim)}
        return layer_kernels(self.dtype, self.device, sizes)

    @property
    def bytes_per_position(self) -> int:
        """Memory of one position of one slot over all layers, in bytes."""
        numbers = sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in self.layout)
        return numbers * self.dtype.itemsize

    def write(
        self, layer: int, key: Tensor, value: Tensor, slots: Tensor, positions: Tensor
    ) -> None:
        """Store a layer's key and value [n, heads, dim] at (slots[i], positions[i])."""
        self.keys[layer][slots, :, positions] = key.to(self.dtype)
        self.values[layer][slots, :, positions] = value.to(self.dtype)

    def rollback(self, slot: int, length: int) -> None:
        """Forget the tokens of `slot` from position `length` on; a shorter slot stays as it is."""
        self.lengths[slot] = min(self.lengths[slot], length)

    def scrub(self, slot: int) -> None:
        """Zero what lies behind the tokens of `slot`: NaN there would not stay behind a mask."""
        n = self.lengths[slot]
        for tensor in (*self.keys, *self.values):
            tensor[slot, :, n:] = 0

    def move(self, source: int, target: int) -> None:
        """Move the row in slot `source` to slot `target`, which it overwrites."""
        n = self.lengths[source]
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :n] = tensor[source, :, :n]
        self.lengths[target], self.lengths[source] = n, 0

    def fork(self, source: int, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Make each of `slots` hold the first tokens of slot `source`, as many as `lengths` says.

        What the slots held is overwritten; `source` must have that many tokens.
        """
        for slot, n in zip(slots, lengths, strict=True):
            for tensor in (*self.keys, *self.values):
                tensor[slot, :, :n] = tensor[source, :, :n]
            self.lengths[slot] = n

    def resize(self, slots: int, capacity: int) -> None:
        """Take another shape in place, layer by layer, keeping what fits of each slot."""
        kept = min(slots, self.slots)
        self.slots, self.capacity = slots, round_to_blocks(capacity)
        self.generation += 1
        fitting = [min(length, self.capacity) for length in self.lengths[:kept]]
        self.lengths, n = fitting + [0] * (slots - kept), max(fitting, default=0)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._zeros(old.shape[1], old.shape[3])
                tensors[layer][:kept, :, :n] = old[:kept, :, :n]
