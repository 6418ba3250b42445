"""Attention of a packed batch: rows of different lengths, laid end to end, over a `SlotCache`.

How attention is shaped. Rows of at most GRID_TOKENS tokens (decoding, verifying) go to the compiled
kernel on a CPU that has it (specdec/kernels/cpu.py), token by token. Elsewhere they are computed
together as a grid over a contiguous range of slots, so that keys and values are a view of the
cache. Longer rows (prefill) are computed one by one, so that a row's shapes depend on that row
alone.

Batch invariance. The compiled kernel computes each token by itself, in an order that depends on its
position alone. In the grid, with `invariant=True`, every reduction has a shape that does not depend
on the batch: each query token is its own batch item, keys come in blocks of KEY_BLOCK accumulated
in order, and blocks beyond a row's end add exact zeros. With linear layers that are invariant row
by row (specdec/model/linear.py) a token's logits are then bit-equal alone, verified among others,
or packed with other rows (DESIGN.md §3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from specdec.kernels.base import LayerKernels
from specdec.model.cache import KEY_BLOCK, LayerLayout, SlotCache

GRID_TOKENS = 24
"""Rows with more tokens than this in one forward attend one by one."""

MANY_ROWS = 16
"""From so many rows on, batched products are faster than torch's fused kernel on a CPU."""

KEY_STEP = 16
"""Attended positions are rounded up to a multiple of this, so that there are few shapes."""

ATTENTION = "specbatch_packed"

Row = tuple[int, int]
"""(slot, number of tokens to append to it)."""


class UnsupportedModel(ValueError):
    """An architecture that cannot run packed; the message says why."""


def upload(device: torch.device, *lists: Sequence[int]) -> tuple[Tensor, ...]:
    """Each list as int64 on the device, all in one transfer."""
    flat = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.int64)
    return torch.split(flat.to(device, non_blocking=True), [len(numbers) for numbers in lists])


class PackedRow(NamedTuple):
    """A row's packed tokens [begin, begin + tokens), which go to `slot` from position `start`."""

    begin: int
    tokens: int
    slot: int
    start: int


def packed_rows(cache: SlotCache, rows: Sequence[Row]) -> list[PackedRow]:
    """Rows laid end to end, each behind what its slot holds."""
    ends = accumulate(count for _, count in rows)
    return [
        PackedRow(end - count, count, slot, cache.lengths[slot])
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


@dataclass(slots=True)
class Grid:
    """Short rows as a batch of one shape over a contiguous range of slots; built once per forward.

    Attributes:
        slots: the range [low, high) of slots that the grid covers; B = high - low.
        tokens: T, tokens per grid row.
        keys: L, positions attended: a multiple of KEY_STEP; if invariant, of KEY_BLOCK.
        cell_token: int64 [B * T], the packed token in each cell (any token in an unused cell).
        cell_position: int64 [B, T], that token's position (0 in an unused cell).
        short_tokens, short_cells: int64 [n], packed tokens of the grid and their cells.
        aligned: the packed tokens are exactly the cells in order.
    """

    slots: tuple[int, int]
    tokens: int
    keys: int
    cell_token: Tensor
    cell_position: Tensor
    short_tokens: Tensor
    short_cells: Tensor
    aligned: bool
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def lay_out(
        cls, rows: Sequence[PackedRow], tokens: int, step: int, device: torch.device
    ) -> Grid:
        """The grid of some rows out of `tokens` packed tokens, positions rounded up to `step`."""
        low, high = min(row.slot for row in rows), max(row.slot for row in rows) + 1
        width = max(row.tokens for row in rows)
        cell_token, cell_position = ([0] * ((high - low) * width) for _ in range(2))
        short_tokens: list[int] = []
        short_cells: list[int] = []
        for begin, count, slot, start in rows:
            cell = (slot - low) * width
            cell_token[cell : cell + count] = range(begin, begin + count)
            cell_position[cell : cell + count] = range(start, start + count)
            short_tokens += range(begin, begin + count)
            short_cells += range(cell, cell + count)
        on_device = upload(device, cell_token, cell_position, short_tokens, short_cells)
        return cls(
            (low, high),
            width,
            -(-max(row.start + row.tokens for row in rows) // step) * step,
            cell_token=on_device[0],
            cell_position=on_device[1].view(high - low, width),
            short_tokens=on_device[2],
            short_cells=on_device[3],
            aligned=cell_token == list(range(tokens)),
        )

    def mask(self, window: int | None) -> Tensor:
        """Additive float32 [B, T, L]: 0 where a cell may attend, else -inf; made once a forward."""
        if window not in self._masks:
            key = torch.arange(self.keys, device=self.cell_position.device)
            query = self.cell_position[..., None]
            visible = key <= query
            if window is not None:
                visible &= key > query - window
            zero = torch.zeros((), device=key.device)
            self._masks[window] = torch.where(visible, zero, float("-inf"))
        return self._masks[window]


@dataclass(slots=True)
class Packing:
    """Where each of the N packed tokens goes and what it may attend to; built once per forward.

    Attributes:
        cache: the slots.
        invariant: whether reductions must not depend on the batch.
        slots, positions: int64 [N] on the device.
        short, long: rows of at most GRID_TOKENS tokens, and those that attend one by one.
        short_rows: int64 [R, 4] on the device, the short ones as kernels take them.
        kernels: what computes short rows and fused layers besides torch, if there is anything.
    """

    cache: SlotCache
    invariant: bool
    slots: Tensor
    positions: Tensor
    short: list[PackedRow]
    long: list[PackedRow]
    short_rows: Tensor
    kernels: LayerKernels | None
    _grid: Grid | None = None

    @classmethod
    def plan(cls, cache: SlotCache, rows: Sequence[Row], invariant: bool) -> Packing:
        """Lay out `rows` (distinct slots, at least one token each) behind what their slots hold."""
        slots: list[int] = []
        positions: list[int] = []
        short: list[PackedRow] = []
        long: list[PackedRow] = []
        for row in packed_rows(cache, rows):
            (short if row.tokens <= GRID_TOKENS else long).append(row)
            slots += [row.slot] * row.tokens
            positions += range(row.start, row.start + row.tokens)
        most = cache.kernels.row_tokens if cache.kernels is not None else None
        cut = cut_rows(np.array(short), most).tolist() if short and most else short
        flat = [number for row in cut for number in row]
        slots_, positions_, short_rows = upload(cache.device, slots, positions, flat)
        return cls(
            cache,
            invariant,
            slots_,
            positions_,
            short,
            long,
            short_rows.view(-1, 4),
            cache.kernels,
        )

    @classmethod
    def of_places(cls, cache: SlotCache, places: Tensor, rows: Tensor) -> Packing:
        """That of tokens at places (slot, position) [2, N] in rows [R, 4], which no host reads."""
        return cls(cache, False, places[0], places[1], [], [], rows, cache.kernels)

    @property
    def grid(self) -> Grid:
        """The short rows as a grid, laid out when the first layer asks for it."""
        if self._grid is None:
            step = KEY_BLOCK if self.invariant else KEY_STEP
            self._grid = Grid.lay_out(self.short, len(self.slots), step, self.cache.device)
        return self._grid


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packing: Packing | LayoutProbe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed batch, called by each transformers attention layer.

    Args:
        query: [1, H, N, D]; key: [1, Hkv, N, D]; value: [1, Hkv, N, Dv]; after rotary embedding.
        packing: where the N tokens belong; passed to the model as a keyword argument.

    Returns:
        [1, N, H, Dv] and None.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"its attention uses {name}, which packed attention does not have"
            )
    if packing is None:
        raise UnsupportedModel("it does not pass keyword arguments on to its attention layers")
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(packing, layer, q, k, v, scale, sliding_window)[None], None


def attend(
    packing: Packing | LayoutProbe,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Write N keys and values to their slots and let each token attend to its own slot.

    Args:
        packing: where the N tokens belong.
        layer: index of the layer in the cache.
        query: [N, H, D]; key: [N, Hkv, D]; value: [N, Hkv, Dv]; after rotary embedding.
        scale: of the scores.
        window: positions that a token may look back, itself included; None: all.

    Returns:
        [N, H, Dv].
    """
    if isinstance(packing, LayoutProbe):
        packing.layers[layer] = LayerLayout(key.shape[1], key.shape[2], value.shape[2])
        return query.new_zeros(*query.shape[:2], value.shape[2])
    packing.cache.write(layer, key, value, packing.slots, packing.positions)
    return attend_stored(packing, layer, query, scale, window)


def attend_stored(
    packing: Packing, layer: int, query: Tensor, scale: float, window: int | None
) -> Tensor:
    """As `attend`, for tokens whose keys and values are in their slots already."""
    keys, values = packing.cache.keys[layer], packing.cache.values[layer]
    kernels = packing.kernels if query.dtype == keys.dtype else None
    if kernels is None and not packing.long:
        return _grid(query, packing, layer, scale, window)
    out = query.new_empty(*query.shape[:2], values.shape[3])
    if kernels is not None and len(packing.short_rows):
        query = query if query.stride(-1) == 1 else query.contiguous()
        kernels.attend(query, keys, values, packing.short_rows, scale, window, out)
    elif packing.short:
        out[packing.grid.short_tokens] = _grid(query, packing, layer, scale, window)
    for row in packing.long:
        out[row.begin : row.begin + row.tokens] = _long(query, packing, row, layer, scale, window)
    return out


AttentionInterface.register(ATTENTION, packed_attention)


def _long(
    queries: Tensor, packing: Packing, row: PackedRow, layer: int, scale: float, window: int | None
) -> Tensor:
    """Attention of one long row: [n, H, Dv] from packed queries [N, H, D]."""
    cache, n = packing.cache, row.tokens
    q = queries[row.begin : row.begin + n].transpose(0, 1)[None]
    keys = cache.keys[layer][row.slot, None, :, : row.start + n].to(q.dtype)
    values = cache.values[layer][row.slot, None, :, : row.start + n].to(q.dtype)
    mask = None
    if row.start or window is not None:
        at = torch.arange(row.start, row.start + n, device=q.device)[:, None]
        key_at = torch.arange(row.start + n, device=q.device)
        mask = key_at <= at
        if window is not None:
            mask &= key_at > at - window
    out = F.scaled_dot_product_attention(
        q, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _grid(
    queries: Tensor, packing: Packing, layer: int, scale: float, window: int | None
) -> Tensor:
    """Attention of all short rows together: [n, H, Dv] for the n short tokens, in packed order."""
    grid, cache = packing.grid, packing.cache
    low, high = grid.slots
    batch, tokens = high - low, grid.tokens
    keys = cache.keys[layer][low:high, :, : grid.keys]  # [B, Hkv, L, D], a view
    values = cache.values[layer][low:high, :, : grid.keys]
    heads, kv_heads = queries.shape[1], keys.shape[1]

    q = queries if grid.aligned else queries.index_select(0, grid.cell_token)
    # [B, T, Hkv, G, D] -> [B, Hkv, G, T, D]: the G query heads of a key/value head share keys.
    q = q.reshape(batch, tokens, kv_heads, heads // kv_heads, -1).permute(0, 2, 3, 1, 4)
    out = _kernel(packing, q)(q, keys, values, grid.mask(window), scale)  # [B, Hkv, G, T, Dv]
    out = out.permute(0, 3, 1, 2, 4).reshape(batch * tokens, heads, -1)
    return out if grid.aligned else out.index_select(0, grid.short_cells)


def _kernel(
    packing: Packing, q: Tensor
) -> Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]:
    if packing.invariant:
        return _invariant
    many = q.device.type == "cpu" and len(q) >= MANY_ROWS
    return _matmul if q.dtype == torch.float32 or many else _fused


def _matmul(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention as two batched matrix products, the softmax in float32.

    Args:
        q: [B, Hkv, G, T, D]; keys: [B, Hkv, L, D]; values: [B, Hkv, L, Dv]; mask: [B, T, L].

    Returns:
        [B, Hkv, G, T, Dv].
    """
    batch, kv_heads, group, tokens, _ = q.shape
    flat, keys = q.reshape(batch * kv_heads, group * tokens, -1), keys.flatten(0, 1)
    if q.dtype == torch.float32:
        scores = torch.bmm(flat * scale, keys.transpose(1, 2))
    else:  # CPUs multiply bfloat16 three times as fast with the many keys on the left
        scores = torch.bmm(keys, flat.transpose(1, 2)).transpose(1, 2).contiguous()
        scores = scores.float().mul_(scale)
    scores.view(batch, kv_heads * group, tokens, -1).add_(mask[:, None])
    out = torch.bmm(torch.softmax(scores, -1).to(values.dtype), values.flatten(0, 1))
    return out.view(batch, kv_heads, group, tokens, -1)


def _fused(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """As `_matmul`, in torch's fused kernel."""
    batch, kv_heads, group, tokens, _ = q.shape
    flat = q.reshape(batch, kv_heads, group * tokens, -1)
    repeated = mask.to(q.dtype).repeat(1, group, 1)[:, None]
    out = F.scaled_dot_product_attention(flat, keys, values, repeated, scale=scale)
    return out.view(batch, kv_heads, group, tokens, -1)


def _invariant(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """As `_matmul`, bit-equal for a token whatever B, T and L are.

    The products are [G, D] x [D, KEY_BLOCK] and [G, KEY_BLOCK] x [KEY_BLOCK, Dv] in every case;
    sums over blocks run in order, and a block past a row's end adds exact zeros. The maximum is
    exact in any order.
    """
    batch, kv_heads, group, tokens, dim = q.shape
    key_blocks = torch.split(keys.float().flatten(0, 1), KEY_BLOCK, 1)
    value_blocks = torch.split(values.float().flatten(0, 1), KEY_BLOCK, 1)
    outs = []
    for t in range(tokens):
        qt = (q[:, :, :, t].float() * scale).reshape(batch * kv_heads, group, dim)
        scores = torch.cat([torch.bmm(qt, block.transpose(1, 2)) for block in key_blocks], -1)
        scores.view(batch, kv_heads * group, -1).add_(mask[:, t, None])
        exps = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = torch.split(exps, KEY_BLOCK, -1)
        total = weights[0].sum(-1, keepdim=True)
        out = torch.bmm(weights[0], value_blocks[0])
        for weight, block in zip(weights[1:], value_blocks[1:], strict=True):
            total += weight.sum(-1, keepdim=True)
            out += torch.bmm(weight, block)
        outs.append((out / total).view(batch, kv_heads, group, -1))
    return torch.stack(outs, 3).to(q.dtype)


class LayoutProbe:
    """Stands in for a `Packing` once, to see what each attention layer caches."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerLayout] = {}
