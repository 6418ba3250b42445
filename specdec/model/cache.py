"""Keys and values of the rows in flight. This class alone owns their length, rollback and place."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from specdec.kernels.base import LayerKernels
from specdec.kernels.choose import layer_kernels
from specdec.kernels.stored import LARGEST, Scales, dequantise, quantise
from specdec.model.features import Features
from specdec.model.pages import PAGE, Pages, pages_of
from specdec.model.recurrent import RecurrentStates
from specdec.model.rows import Row, upload

KEY_BLOCK = 128
"""The lengths that batch-invariant attention reads, and a table's, are multiples of this.

Raised, short rows pay for more positions that are empty.
"""


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """What one layer caches per position, and how much of it a token attends to.

    Attributes:
        heads, key_dim, value_dim: `heads` times key_dim and value_dim numbers per position.
        window: positions that a token looks back, itself included; None: all.
        chunked: whether it looks back no further than the last multiple of `window` (Llama 4).
    """

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
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
    """Slots of up to `capacity` positions, over pages that they share (specdec/model/pages.py).

    Live rows occupy slots 0..n-1 without holes (the engine moves the last row into a hole).
    Positions behind a row's tokens are finite (zero or stale, see `scrub`) and masked.

    Attributes:
        lengths: per slot, how many positions hold the tokens of its row.
        pages: which pages each slot has.
        table: int64 [slots, capacity / PAGE], the same on the device, once `extend` returns.
        keys, values: per layer, [1 + pages, heads, PAGE, dim]. In memory the keys of a page lie by
            dimension if the kernels want it.
        key_scales, value_scales: per layer, float32 [1 + pages, heads, PAGE]; empty lists unless
            keys and values are numbers of eight bits (specdec/kernels/stored.py).
        states: what layers keep whose state runs on, if the model has such.
        features: what it keeps of each token for a draft that reads it, if it does.
        ahead: how far the token that a position is computed of is ahead of it; 0 in a language
            model.
        kernels_read_prompts: whether they may attend for long rows, too.
        generation: how often these tensors were replaced by others: what remembers their addresses
            is out of date when this changes.

    Args:
        layout: of each layer; one that attends to nothing has no heads.
        capacity: most positions of a slot. There are pages for this many in every slot.
        dtype: of keys and values as they are read.
        stored: of them as they are kept, one of LARGEST; by default `dtype`.
        use_kernels: whether hand-written kernels may work on it (specdec/kernels).
        states: without slots; it grows with the cache.
        ahead: see above.
    """

    def __init__(
        self,
        layout: tuple[LayerLayout, ...],
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        stored: torch.dtype | None = None,
        use_kernels: bool = True,
        states: RecurrentStates | None = None,
        ahead: int = 0,
    ) -> None:
        self.layout, self.dtype, self.device, self.states = layout, dtype, device, states
        self.stored = stored or dtype
        self.features: Features | None = None
        self.ahead = ahead
        self.capacity, self.lengths = 0, list[int]()
        self.pages = Pages(0, 0, 0)
        self.table = torch.zeros(0, 0, dtype=torch.int64, device=device)
        self._use_kernels, self.kernels_read_prompts = use_kernels, True
        by_dimension = self.kernels is not None and self.kernels.keys_by_dimension
        self.keys = [
            self._zeros(self.stored, each.heads, each.key_dim, by_dimension=by_dimension)
            for each in layout
        ]
        self.values = [self._zeros(self.stored, each.heads, each.value_dim) for each in layout]
        scaled = layout if self.stored in LARGEST else ()
        self.key_scales = [self._zeros(torch.float32, each.heads) for each in scaled]
        self.value_scales = [self._zeros(torch.float32, each.heads) for each in scaled]
        self.generation = 0
        self.grow(slots, capacity)

    def _zeros(
        self, dtype: torch.dtype, heads: int, *dims: int, by_dimension: bool = False
    ) -> Tensor:
        shape = (1 + self.pages.total, heads, *((*dims, PAGE) if by_dimension else (PAGE, *dims)))
        zeros = torch.zeros(shape, dtype=dtype, device=self.device)
        return zeros.transpose(2, 3) if by_dimension else zeros

    @property
    def _pools(self) -> tuple[list[Tensor], ...]:
        """All that lies in pages: tensors [1 + pages, heads, PAGE, ..] by layer."""
        return self.keys, self.values, self.key_scales, self.value_scales

    @property
    def _tensors(self) -> Iterator[Tensor]:
        return chain.from_iterable(self._pools)

    def scales(self, layer: int) -> Scales | None:
        """Those of a layer, if its keys and values have any."""
        if not self.key_scales:
            return None
        return Scales(self.key_scales[layer], self.value_scales[layer])

    @functools.cached_property
    def kernels(self) -> LayerKernels | None:
        """The kernels that can read this cache, if there are any and they are wanted."""
        if not self._use_kernels:
            return None
        attending = [layer for layer in self.layout if layer.value_dim]
        sizes = {size for layer in attending for size in (layer.key_dim, layer.value_dim)}
        return layer_kernels(self.dtype, self.device, sizes, self.stored) if sizes else None

    @property
    def slots(self) -> int:
        """How many slots there are."""
        return len(self.lengths)

    @property
    def bytes_per_position(self) -> int:
        """Memory of one position over all layers, in bytes."""
        return sum(tensor[0].nbytes for tensor in self._tensors) // PAGE

    @property
    def bytes_per_slot(self) -> int:
        """Memory of a slot besides its positions, in bytes: its states."""
        return self.states.bytes_per_slot if self.states is not None else 0

    def grow(self, slots: int, capacity: int, pages: int | None = None) -> None:
        """Have at least so many slots, positions in each, and pages, keeping what is there.

        Without `pages` there are as many as all slots can hold.
        """
        slots = max(slots, self.slots)
        self.capacity = max(round_to_blocks(capacity), self.capacity)
        width, old = self.capacity // PAGE, self.pages.total
        self.pages.grow(slots, width, max(old, slots * width if pages is None else pages))
        self.lengths += [0] * (slots - self.slots)
        if self.states is not None:
            self.states.grow(slots)
        if self.pages.total > old or self.table.shape != (slots, width):
            self.generation += 1
        if self.table.shape != (slots, width):
            table = torch.zeros(slots, width, dtype=torch.int64, device=self.device)
            table[: self.table.shape[0], : self.table.shape[1]] = self.table
            self.table = table
        if self.pages.total > old:
            for tensors in self._pools:
                for layer, tensor in enumerate(tensors):  # one by one: both are there meanwhile
                    _, heads, _, *dims = tensor.shape
                    by_dimension = not tensor.is_contiguous()
                    grown = self._zeros(tensor.dtype, heads, *dims, by_dimension=by_dimension)
                    grown[: 1 + old] = tensor
                    tensors[layer] = grown

    def extend(self, rows: Sequence[Row]) -> None:
        """Give slots pages for the tokens that `rows` append, and the device the table.

        Raises:
            OutOfPages: there are too few.
        """
        held = self.pages.rows
        for slot, count in rows:
            if self.lengths[slot] + count > PAGE * len(held[slot]):
                self.pages.extend(slot, self.lengths[slot] + count)
        if changed := self.pages.changed:
            width = self.table.shape[1]
            at = [slot * width + place for slot, place in changed]
            places, pages = upload(self.device, at, list(changed.values()))
            self.table.view(-1)[places] = pages
            changed.clear()

    def places(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The pages and the places in them of positions in slots, all int64 [n] on the device."""
        return self.table[slots, positions // PAGE], positions % PAGE

    def write(self, layer: int, key: Tensor, value: Tensor, places: tuple[Tensor, Tensor]) -> None:
        """Store a layer's key and value [n, heads, dim] at `places`."""
        pages, within = places
        key, value = key.to(self.dtype), value.to(self.dtype)
        if (scales := self.scales(layer)) is not None:
            key, scales.keys[pages, :, within] = quantise(key, self.stored)
            value, scales.values[pages, :, within] = quantise(value, self.stored)
        self.keys[layer][pages, :, within] = key
        self.values[layer][pages, :, within] = value

    def keep_features(self, features: Features) -> None:
        """Keep features of each token from now on, where the keys of one more layer would be."""
        assert not self.pages.total, "no token is there without them"
        self.features, self.layout = features, (*self.layout, LayerLayout(1, features.width, 0))
        self.keys.append(self._zeros(self.dtype, 1, features.width))
        self.values.append(self._zeros(self.dtype, 1, 0))

    def write_features(self, states: Sequence[Tensor], places: tuple[Tensor, Tensor]) -> None:
        """Store the features of n tokens at `places`, made of the states [n, hidden] of layers."""
        assert self.features is not None, "this cache keeps features"
        pages, within = places
        fused = self.features.fuse(torch.cat([*states], -1))
        self.keys[-1][pages, 0, within] = fused.to(self.dtype)

    def read_features(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The features [n, width] of positions in slots, int64 [n] each."""
        assert self.features is not None, "this cache keeps features"
        self.extend(())  # rows may have moved since the model ran last
        pages, within = self.places(slots, positions)
        return self.keys[-1][pages, 0, within]

    def read(self, layer: int, slots: slice, positions: int) -> tuple[Tensor, Tensor]:
        """A copy of a layer's keys and values in the first positions of some slots.

        Returns:
            [slots, heads, positions, dim] each. What lies behind a row's tokens is finite.
        """
        pages = self.table[slots, : pages_of(positions)]

        def rows(tensor: Tensor) -> Tensor:
            return tensor[pages].transpose(1, 2).flatten(2, 3)[:, :, :positions]

        keys, values = rows(self.keys[layer]), rows(self.values[layer])
        if (scales := self.scales(layer)) is None:
            return keys, values
        return (
            dequantise(keys, rows(scales.keys), self.dtype),
            dequantise(values, rows(scales.values), self.dtype),
        )

    def rollback(self, slot: int, length: int) -> None:
        """Forget the tokens of `slot` from position `length` on; a shorter slot stays as it is.

        A slot that shares its page at `length` with others forgets the whole page, and one whose
        states have run on beyond what is left forgets all: `lengths` tells.
        """
        left = self.pages.own(slot, min(self.lengths[slot], length))
        if self.states is not None and not self.states.rollback(slot, left):
            left = self.pages.own(slot, 0)
        self.lengths[slot] = left

    @torch.inference_mode()
    def keep(
        self, slots: Sequence[int], bases: Sequence[int], paths: Sequence[Sequence[int]]
    ) -> None:
        """Leave each of some slots one path of its tree (specdec/model/trees.py) and no other node.

        Keys and values stored at base + path[i] move to base + i, and the slot ends behind them.

        Args:
            slots: distinct.
            bases: where each slot's node 0 is stored.
            paths: numbers of each slot's nodes, ascending; one may be empty.
        """
        moves = [
            (slot, base + node, base + i)
            for slot, base, path in zip(slots, bases, paths, strict=True)
            for i, node in enumerate(path)
            if node != i
        ]
        if moves:
            who, sources, targets = upload(self.device, *zip(*moves, strict=True))
            (page, within), (to_page, to_within) = (
                self.places(who, where) for where in (sources, targets)
            )
            for tensor in self._tensors:
                # Not every operator knows floats of eight bits, but all know bytes.
                whole = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
                whole[to_page, :, to_within] = whole[page, :, within]
        for slot, base, path in zip(slots, bases, paths, strict=True):
            self.rollback(slot, base + len(path))

    def holds(self, slot: int, length: int) -> bool:
        """Whether another slot can take over the first `length` tokens of a slot."""
        states_there = self.states is None or self.states.kept[slot] <= length
        return length <= self.lengths[slot] and states_there

    def pretend(self, length: int) -> None:
        """Let each slot have so many made-up tokens, as forwards that are timed need them."""
        self.lengths = [length] * self.slots
        if self.states is not None:
            self.states.pretend(length)

    def scrub(self, slot: int, length: int) -> None:
        """Zero what `slot` alone has written from position `length` on.

        NaN there would not stay behind a mask.
        """
        first, within = divmod(length, PAGE)
        for page in self.pages.alone(slot, first):
            for tensor in self._tensors:
                tensor[page, :, within:] = 0
            within = 0

    def release(self, slot: int) -> None:
        """Give up all pages of a slot."""
        self.pages.cut(slot, 0)
        self.lengths[slot] = 0
        if self.states is not None:
            self.states.reset(slot)

    def move(self, source: int, target: int) -> None:
        """Move the row in slot `source` to slot `target`, which gives up what it has."""
        self.pages.move(source, target)
        if self.states is not None:
            self.states.move(source, target)
        self.lengths[target], self.lengths[source] = self.lengths[source], 0

    def fork(self, source: int, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Make each of `slots` hold the first tokens of slot `source`, as many as `lengths` says.

        What the slots held is given up; `source` must be one that `holds` that many. Full pages
        are shared, states copied.
        """
        for slot, length in zip(slots, lengths, strict=True):
            assert self.holds(source, length), "the source holds these tokens"
            self.adopt(slot, self.pages.rows[source], length)
            if self.states is not None:
                self.states.fork(source, slot)

    def adopt(self, slot: int, pages: Sequence[int], length: int) -> None:
        """Let `slot` hold the first `length` tokens of `pages`.

        It shares all pages but the last, unless that is full: the row will write there, and has a
        copy of its own.
        """
        full, rest = divmod(length, PAGE)
        self.pages.share(slot, pages[:full])
        self.lengths[slot] = self.pages.own(slot, full * PAGE)
        if rest:
            self.pages.extend(slot, length)
            own = self.pages.rows[slot][full]
            for tensor in self._tensors:
                tensor[own] = tensor[pages[full]]
        self.lengths[slot] = length
