"""States that run on: what recurrent layers keep of each slot, and how tokens are taken back.

A state cannot be rolled back. So a slot's states stay as they were some tokens ago, together with
what the recurrences have read of each token since: their *inputs*. A forward replays these before
its own tokens, for which no weights are read, and a rolled back token is one that is replayed no
more. When there are many inputs, those that nobody takes back are *folded* into the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from specdec.model.rows import PackedRow, upload

WIDEST = 9
"""Most tokens that a convolution over time reads, its own included.

So many more inputs are kept than can be taken back. Raised, each slot takes more memory.
"""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StateLayout:
    """What one recurrence keeps of a slot.

    Attributes:
        state: shape of its state, in float32; None: a convolution, which has inputs only.
        inputs: shape and dtype of what it reads of a token.
    """

    state: Shape | None
    inputs: tuple[tuple[Shape, torch.dtype], ...]


Run = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]
"""Goes on from states [B, ...]: takes inputs that move them and such that only read them, each
[B, T, ...]; gives outputs [B, T, ...] and the states then. Inputs of zero move nothing."""


@dataclass(frozen=True, slots=True)
class Scan:
    """A recurrence over N packed tokens.

    Attributes:
        state: shape of its state.
        inputs: [N, ...], what moves the state.
        readers: [N, ...], what only reads it, such as queries.
        run: computes it.
    """

    state: Shape
    inputs: tuple[Tensor, ...]
    readers: tuple[Tensor, ...]
    run: Run


class RecurrentStates:
    """States and inputs of all recurrences of a model, by slot.

    A slot's tokens up to `kept` are in its states; the inputs of those behind are in rings, that of
    position p at p modulo the ring's size. States of a slot without tokens are zero.

    Args:
        layouts: of each recurrence.
        reach: most tokens of a short row, and most that can be taken back.
        device: where they are.

    Attributes:
        kept: per slot, how many of its tokens are in its states.
        settled: per slot, how many of its tokens will not be taken back any more.
    """

    def __init__(self, layouts: Sequence[StateLayout], reach: int, device: torch.device) -> None:
        self.layouts, self.reach, self.ring = tuple(layouts), reach, reach + WIDEST - 1
        self.kept, self.settled = list[int](), list[int]()
        self._places = list[int]()  # of each slot in the tensors: a row that moves is not copied
        self._device = device
        self.states = [
            torch.zeros(0, *(layout.state or (0,)), dtype=torch.float32, device=device)
            for layout in self.layouts
        ]
        self.inputs = [
            [
                torch.zeros(0, self.ring, *shape, dtype=dtype, device=device)
                for shape, dtype in layout.inputs
            ]
            for layout in self.layouts
        ]

    @property
    def bytes_per_slot(self) -> int:
        """Memory of one slot over all recurrences, in bytes."""
        return sum(
            (0 if layout.state is None else 4 * prod(layout.state))
            + sum(self.ring * prod(shape) * dtype.itemsize for shape, dtype in layout.inputs)
            for layout in self.layouts
        )

    def grow(self, slots: int) -> None:
        """Have at least so many slots, keeping what is there."""
        more = slots - len(self.kept)
        if more <= 0:
            return
        self._places += range(len(self.kept), slots)
        self.kept += [0] * more
        self.settled += [0] * more
        for tensors in (self.states, *self.inputs):
            for i, old in enumerate(tensors):  # one by one: both are there meanwhile
                tensors[i] = old.new_zeros(slots, *old.shape[1:])
                tensors[i][: len(old)] = old

    def rollback(self, slot: int, length: int) -> bool:
        """Forget the tokens of a slot from position `length` on; those before it are settled.

        Returns:
            Whether that can be done; otherwise it has forgotten all.
        """
        if length < self.kept[slot]:
            self.reset(slot)
            return False
        self.settled[slot] = length
        return True

    def reset(self, slot: int) -> None:
        """Forget all tokens of a slot."""
        if self.kept[slot]:
            for state in self.states:
                state[self._places[slot]] = 0
        self.kept[slot] = self.settled[slot] = 0

    def move(self, source: int, target: int) -> None:
        """Move the row in slot `source` to slot `target`, whose row is forgotten."""
        self.reset(target)
        for each in (self.kept, self.settled, self._places):
            each[source], each[target] = each[target], each[source]

    def fork(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` does; what it held is given up."""
        at, to = self._places[source], self._places[target]
        for tensor in (*self.states, *(ring for rings in self.inputs for ring in rings)):
            tensor[to] = tensor[at]
        self.kept[target] = self.settled[target] = self.kept[source]

    def pretend(self, length: int) -> None:
        """Let each slot have so many made-up tokens, as many of them to be replayed as usual."""
        self.kept = [max(0, length - self.reach // 2)] * len(self.kept)
        self.settled = [length] * len(self.kept)

    def replay(self, short: Sequence[PackedRow], long: Sequence[PackedRow]) -> Replay:
        """How a forward over rows of at most `reach` tokens, and longer ones, goes on from here."""
        kept: dict[int, int] = {}
        fold, rows = _Grid(), _Grid()
        stored: list[tuple[int, int, int]] = []
        for row in (*short, *long):
            place, before = self._places[row.slot], self.kept[row.slot]
            pending, is_long = row.start - before, row.tokens > self.reach
            folded = 0
            if is_long:
                folded = pending
            elif pending + row.tokens > self.reach:
                too_many = pending + row.tokens - self.reach
                folded = max(self.settled[row.slot] - before, too_many)
            kept[row.slot] = row.start + row.tokens if is_long else before + folded
            if folded:
                fold.add(place, self._ring(place, before, folded), [])
            if not is_long:
                old = self._ring(place, before + folded, pending - folded)
                rows.add(place, old, range(row.begin, row.begin + row.tokens))
            last = min(row.tokens, self.ring)
            into = self._ring(place, row.start + row.tokens - last, last)
            begin = row.begin + row.tokens - last
            stored += [(*at, begin + i) for i, at in enumerate(into)]
        return Replay(
            self,
            kept,
            [(self._places[row.slot], row) for row in sorted((*short, *long))],
            [(self._places[row.slot], row) for row in long],
            fold.upload(self._device),
            rows.upload(self._device),
            _columns(stored, 3, self._device),
        )

    def _ring(self, place: int, begin: int, count: int) -> list[tuple[int, int]]:
        return [(place, position % self.ring) for position in range(begin, begin + count)]


class _Grid:
    """Rows of a padded grid as they are collected; see `Placed`."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.width = 0
        self.old: list[tuple[int, int, int, int]] = []
        self.new: list[tuple[int, int, int]] = []

    def add(self, place: int, old: Sequence[tuple[int, int]], new: Sequence[int]) -> None:
        """A row that has inputs in the ring at `old`, followed by those of packed tokens `new`."""
        row = len(self.places)
        self.places.append(place)
        self.old += [(row, column, *at) for column, at in enumerate(old)]
        self.new += [(row, len(old) + i, token) for i, token in enumerate(new)]
        self.width = max(self.width, len(old) + len(new))

    def upload(self, device: torch.device) -> Placed:
        (places,) = upload(device, self.places)
        old, new = _columns(self.old, 4, device), _columns(self.new, 3, device)
        return Placed(places, self.width, (old[0], old[1]), (old[2], old[3]), new[:2], new[2])


@dataclass(frozen=True, slots=True)
class Placed:
    """R rows of a padded grid of inputs [R, width, ...], and where these come from.

    Attributes:
        places: int64 [R], where the rows' states are.
        width: of the grid.
        old: rows and columns of inputs that come from rings, two of int64 [m].
        ring: which: place and index in it, two of int64 [m].
        new: rows and columns of those of this forward's tokens, two of int64 [n].
        tokens: which packed tokens these are, int64 [n].
    """

    places: Tensor
    width: int
    old: tuple[Tensor, Tensor]
    ring: tuple[Tensor, Tensor]
    new: tuple[Tensor, ...]
    tokens: Tensor

    def lay_out(self, packed: Tensor, ring: Tensor | None) -> Tensor:
        """The grid, zeros where it has nothing.

        Args:
            packed: inputs of the packed tokens, [N, ...].
            ring: [places, size, ...]; None: only what comes from the packed tokens is wanted.
        """
        grid = packed.new_zeros(len(self.places), self.width, *packed.shape[1:])
        if ring is not None:
            grid[self.old] = ring[self.ring]
        grid[self.new] = packed[self.tokens]
        return grid


def _columns(
    rows: Sequence[tuple[int, ...]], width: int, device: torch.device
) -> tuple[Tensor, ...]:
    """The columns of rows of so many numbers, as int64 on a device."""
    return upload(device, *(zip(*rows, strict=True) if rows else [()] * width))


@dataclass(slots=True)
class Replay:
    """One forward over recurrent states; built once, read by every recurrence.

    Attributes:
        states: what it goes on from, and changes.
        kept: how many tokens are in the states of its slots when it is over.
        rows: all rows in the order of their tokens, each with the place of its states.
        long: those that are computed one by one.
        fold: inputs that are moved into the states first.
        short: short rows, with the inputs that are replayed before their tokens.
        stored: place and index in the ring of inputs that are kept, and whose: three of int64 [n].
    """

    states: RecurrentStates
    kept: dict[int, int]
    rows: list[tuple[int, PackedRow]]
    long: list[tuple[int, PackedRow]]
    fold: Placed
    short: Placed
    stored: tuple[Tensor, ...]
    _windows: dict[int, tuple[int, tuple[Tensor, ...], tuple[Tensor, ...]]] = field(
        default_factory=dict
    )

    def finish(self) -> None:
        """Note what the states hold now that the forward is over."""
        for slot, length in self.kept.items():
            self.states.kept[slot] = length

    def scan(self, number: int, scan: Scan) -> Tensor:
        """Outputs [N, ...] of recurrence `number`."""
        state, rings = self.states.states[number], self.states.inputs[number]

        def go_on(placed: Placed) -> tuple[Tensor, Tensor]:
            inputs = [placed.lay_out(x, ring) for x, ring in zip(scan.inputs, rings, strict=True)]
            readers = [placed.lay_out(x, None) for x in scan.readers]
            return scan.run(state[placed.places], inputs, readers)

        if self.fold.width:
            state[self.fold.places] = go_on(self.fold)[1]
        outputs: list[tuple[Tensor | slice, Tensor]] = []
        if self.short.width:
            outputs.append((self.short.tokens, go_on(self.short)[0][self.short.new]))
        for place, row in self.long:
            own = slice(row.begin, row.begin + row.tokens)
            inputs, readers = ([x[None, own] for x in xs] for xs in (scan.inputs, scan.readers))
            out, after = scan.run(state[place : place + 1], inputs, readers)
            state[place] = after[0]
            outputs.append((own, out[0]))
        self._store(number, scan.inputs)
        first = outputs[0][1]
        result = first.new_empty(len(scan.inputs[0]), *first.shape[1:])
        for at, out in outputs:
            result[at] = out
        return result

    def convolve(
        self, number: int, x: Tensor, kernel: int, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Outputs [C, N] of recurrence `number`, a causal convolution of inputs x [C, N].

        Args:
            number: which recurrence.
            x: of the packed tokens.
            kernel: how many tokens it reads, its own included.
            run: computes it over one row [C, n] that begins with as many others.
        """
        if kernel not in self._windows:
            self._windows[kernel] = self._window(kernel)
        length, (old, *ring), (new,) = self._windows[kernel]
        packed = x.transpose(0, 1)
        joined = x.new_zeros(length, len(x))
        joined[old] = self.states.inputs[number][0][tuple(ring)]
        joined[new] = packed
        self._store(number, [packed])
        return run(joined.transpose(0, 1))[:, new]

    def _window(self, kernel: int) -> tuple[int, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Rows end to end, each behind the `kernel` - 1 inputs before it.

        Returns:
            Their length; where the inputs from rings are, and their places and indices in these;
            where the packed tokens are.
        """
        old: list[tuple[int, int, int]] = []
        new: list[tuple[int]] = []
        begin = 0
        for place, row in self.rows:
            first = begin + kernel - 1 - row.start  # where its position 0 would be
            known = range(max(0, row.start - kernel + 1), row.start)
            old += [(first + p, place, p % self.states.ring) for p in known]
            new += [(begin + kernel - 1 + i,) for i in range(row.tokens)]
            begin += kernel - 1 + row.tokens
        device = self.stored[0].device
        return begin, _columns(old, 3, device), _columns(new, 1, device)

    def _store(self, number: int, inputs: Sequence[Tensor]) -> None:
        place, index, tokens = self.stored
        for ring, x in zip(self.states.inputs[number], inputs, strict=True):
            ring[place, index] = x[tokens]
