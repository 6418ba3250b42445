"""Where the tokens of one forward belong, made once and read by every attention layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from specdec.kernels.base import LayerKernels
from specdec.kernels.scoring import PLAIN
from specdec.kernels.structs import Extras, Forward
from specdec.model.cache import SlotCache
from specdec.model.grid import Grid
from specdec.model.recurrent import Replay
from specdec.model.rows import PackedRow, Row, cut_rows, packed_rows, upload
from specdec.model.trees import Trees, lay_out

GRID_TOKENS = 24
"""Rows with more tokens than this in one forward attend one by one.

Rows that decode or verify have fewer, prefill has more. Raised, a long row that is in the grid
makes its other rows as wide as itself. Rows that attend one by one have shapes of their own, so
their bits depend on no other row.
"""


@dataclass(slots=True)
class Packing:
    """Where each of the N packed tokens goes and what it may attend to; built once per forward.

    Attributes:
        cache: the slots.
        invariant: whether reductions must not depend on the batch.
        slots, positions: int64 [N] on the device.
        stored: int64 [N], the places in their slots; other than positions in trees only.
        paths: int64 [2, N], bases and masks of the tokens if there are trees (`trees.lay_out`).
        short, long: rows that are trees or have at most GRID_TOKENS tokens, and all others.
        apart: the long ones that kernels do not take: they attend one by one.
        kernel_rows: int64 [R, 4] on the device, the others as kernels take them.
        kernels: what computes short rows and fused layers besides torch, if there is anything.
        replay: how states that run on go on from what the slots have, if the model has such.
    """

    cache: SlotCache
    invariant: bool
    slots: Tensor
    positions: Tensor
    stored: Tensor
    paths: Tensor | None
    short: list[PackedRow]
    long: list[PackedRow]
    apart: list[PackedRow]
    kernel_rows: Tensor
    kernels: LayerKernels | None
    replay: Replay | None = None
    _shared: Forward | None = None
    _turns: int = 0
    _grid: Grid | None = None
    _places: tuple[Tensor, Tensor] | None = None

    @classmethod
    def plan(
        cls, cache: SlotCache, rows: Sequence[Row], invariant: bool, trees: Trees = None
    ) -> Packing:
        """Lay out `rows` (distinct slots, at least one token each) behind what their slots have.

        Raises:
            ValueError: see `trees.lay_out`, or the cache has states, which no tree can branch.
        """
        if trees is not None and cache.states is not None:
            raise ValueError("trees: states that run on cannot branch; give such a model chains")
        slots: list[int] = []
        stored: list[int] = []
        short: list[PackedRow] = []
        long: list[PackedRow] = []
        packed = packed_rows(cache.lengths, rows)
        for i, row in enumerate(packed):
            is_short = row.tokens <= GRID_TOKENS or (trees is not None and trees[i] is not None)
            (short if is_short else long).append(row)
            slots += [row.slot] * row.tokens
            stored += range(row.start, row.start + row.tokens)
        kernels, most, prompt = cache.kernels, None, 0
        if kernels is not None:
            most = kernels.row_tokens
            prompt = kernels.prompt_tokens if cache.kernels_read_prompts else 0
        apart = [row for row in long if row.tokens > prompt]
        others = [*short, *(row for row in long if row.tokens <= prompt)]
        cut = cut_rows(np.array(others), most).tolist() if others and most else others
        flat = [number for row in cut for number in row]
        paths: Tensor | None = None
        if trees is None:
            slots_, stored_, kernel_rows = upload(cache.device, slots, stored, flat)
            positions = stored_
        else:
            places, bases, masks = lay_out(packed, trees)
            slots_, stored_, positions, both, kernel_rows = upload(
                cache.device, slots, stored, places, bases + masks, flat
            )
            paths = both.view(2, -1)
        return cls(
            cache,
            invariant,
            slots_,
            positions,
            stored_,
            paths,
            short,
            long,
            apart,
            kernel_rows.view(-1, 4),
            kernels,
            cache.states.replay(short, long) if cache.states is not None else None,
        )

    @classmethod
    def of_places(cls, cache: SlotCache, places: Tensor, rows: Tensor) -> Packing:
        """That of tokens at some places in rows [R, 4], which no host reads.

        `places`, int64 [2 or 5, N], are slots and positions; with trees also where the tokens are
        stored, and their paths.
        """
        slots, positions = places[:2]
        stored, paths = (positions, None) if len(places) == 2 else (places[2], places[3:])
        return cls(cache, False, slots, positions, stored, paths, [], [], [], rows, cache.kernels)

    def layer_of(self, attention: Any) -> int:
        """Which layer attends now; those that share one module (Zamba) are told by their turns."""
        layer: int | None = attention.layer_idx
        if layer is None or layer < 0:
            layer, self._turns = self._turns, self._turns + 1
        return layer

    def shared(self, angles: tuple[Tensor, Tensor]) -> Forward:
        """What the layers of a forward share, for kernels that take a layer as a whole.

        `angles` are cosines and sines, [1, N, D] each: the same for all layers.
        """
        if self._shared is None:
            extras = Extras.of(PLAIN, False, self.paths)
            self._shared = Forward.of(
                angles, self.cache.table, self.slots, self.stored, self.kernel_rows, extras
            )
        return self._shared

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Where the tokens are stored, looked up when the first layer asks for it."""
        if self._places is None:
            self._places = self.cache.places(self.slots, self.stored)
        return self._places

    @property
    def grid(self) -> Grid:
        """The short rows as a grid, laid out when the first layer asks for it."""
        if self._grid is None:
            self._grid = Grid.lay_out(
                self.short, self.positions, self.paths, invariant=self.invariant
            )
        return self._grid
