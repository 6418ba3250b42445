"""Attention of a packed batch: rows of different lengths, laid end to end, over a `SlotCache`.

How attention is shaped. Rows of at most GRID_TOKENS tokens (decoding, verifying) go to the compiled
kernel on a CPU that has it (specdec/kernels.py), token by token. Elsewhere they are computed
together as a grid over a contiguous range of slots, so that keys and values are a view of the
cache. Longer rows (prefill) are computed one by one, so that a row's shapes depend on that row
alone.

Batch invariance. The compiled kernel computes each token by itself, in an order that depends on its
position alone. In the grid, with `invariant=True`, every reduction has a shape that does not depend
on the batch: each query token is its own batch item, keys come in blocks of KEY_BLOCK accumulated
in order, and blocks beyond a row's end add exact zeros. With linear layers that are invariant row
by row (specdec/linear.py) a token's logits are then bit-equal alone, verified among others, or
packed with other rows (DESIGN.md §3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from specdec.cache import KEY_BLOCK, LayerLayout, SlotCache, round_to_blocks
from specdec.kernels import Kernels

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


@dataclass(frozen=True, slots=True)
class LongRow:
    """A row that attends by itself: packed tokens [begin, end), from position `start` of `slot`."""

    slot: int
    begin: int
    end: int
    start: int


@dataclass(slots=True)
class Packing:
    """Where each of the N packed tokens goes and what it may attend to; built once per forward.

    Attributes:
        cache: the slots.
        invariant: whether reductions must not depend on the batch.
        slots, positions: int64 [N] on the device.
        long: rows that attend one by one.
        grid_slots: the contiguous range [low, high) of slots that the grid covers; B = high - low.
        grid_tokens: T, tokens per grid row.
        keys: L, positions attended by the grid: a multiple of KEY_STEP; if invariant, of KEY_BLOCK.
        cell_token: int64 [B * T], the packed token in each grid cell (any token in an unused cell).
        cell_position: int64 [B, T], that token's position (0 in an unused cell).
        short_tokens, short_cells: int64 [n], packed tokens of the grid and their cells.
        short_rows: int64 [R, 4], the grid's rows: first token, tokens, slot, first position.
        aligned: the packed tokens are exactly the grid's cells in order.
        kernels: what computes the grid's rows and fused layers on a CPU, if there is anything.
    """

    cache: SlotCache
    invariant: bool
    slots: Tensor
    positions: Tensor
    long: list[LongRow]
    grid_slots: tuple[int, int]
    grid_tokens: int
    keys: int
    cell_token: Tensor
    cell_position: Tensor
    short_tokens: Tensor
    short_cells: Tensor
    short_rows: Tensor
    aligned: bool
    kernels: Kernels | None
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def plan(cls, cache: SlotCache, rows: Sequence[Row], invariant: bool) -> Packing:
        """Lay out `rows` (distinct slots, at least one token each) behind what their slots hold."""
        short = [slot for slot, count in rows if count <= GRID_TOKENS]
        low, high = (min(short), max(short) + 1) if short else (0, 0)
        width = max((count for _, count in rows if count <= GRID_TOKENS), default=0)
        cells = (high - low) * width
        slots: list[int] = []
        positions: list[int] = []
        long: list[LongRow] = []
        cell_token, cell_position = [0] * cells, [0] * cells
        short_tokens: list[int] = []
        short_cells: list[int] = []
        short_rows: list[int] = []
        keys = 0
        for slot, count in rows:
            start, begin = cache.lengths[slot], len(slots)
            slots += [slot] * count
            positions += range(start, start + count)
            if count > GRID_TOKENS:
                long.append(LongRow(slot, begin, begin + count, start))
                continue
            keys = max(keys, start + count)
            cell = (slot - low) * width
            cell_token[cell : cell + count] = range(begin, begin + count)
            cell_position[cell : cell + count] = range(start, start + count)
            short_tokens += range(begin, begin + count)
            short_cells += range(cell, cell + count)
            short_rows += (begin, count, slot, start)
        on_device = upload(
            cache.device, slots, positions, cell_token, cell_position, short_tokens, short_cells,
            short_rows,
        )  # fmt: skip
        return cls(
            cache,
            invariant,
            slots=on_device[0],
            positions=on_device[1],
            long=long,
            grid_slots=(low, high),
            grid_tokens=width,
            keys=round_to_blocks(keys) if invariant else -(-keys // KEY_STEP) * KEY_STEP,
            cell_token=on_device[2],
            cell_position=on_device[3].view(high - low, width) if cells else on_device[3],
            short_tokens=on_device[4],
            short_cells=on_device[5],
            short_rows=on_device[6].view(-1, 4),
            aligned=not long and cell_token == list(range(len(slots))),
            kernels=cache.kernels,
        )

    def mask(self, window: int | None) -> Tensor:
        """Additive float32 [B, T, L]: 0 where a cell may attend, else -inf; made once a forward."""
        if window not in self._masks:
            key = torch.arange(self.keys, device=self.cache.device)
            query = self.cell_position[..., None]
            visible = key <= query
            if window is not None:
                visible &= key > query - window
            zero = torch.zeros((), device=self.cache.device)
            self._masks[window] = torch.where(visible, zero, float("-inf"))
        return self._masks[window]


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
    elif packing.grid_tokens:
        out[packing.short_tokens] = _grid(query, packing, layer, scale, window)
    for row in packing.long:
        out[row.begin : row.end] = _long(query, packing, row, layer, scale, window)
    return out


AttentionInterface.register(ATTENTION, packed_attention)


def _long(
    queries: Tensor, packing: Packing, row: LongRow, layer: int, scale: float, window: int | None
) -> Tensor:
    """Attention of one long row: [n, H, Dv] from packed queries [N, H, D]."""
    cache, n = packing.cache, row.end - row.begin
    q = queries[row.begin : row.end].transpose(0, 1)[None]
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
    low, high = packing.grid_slots
    batch, tokens = high - low, packing.grid_tokens
    keys = packing.cache.keys[layer][low:high, :, : packing.keys]  # [B, Hkv, L, D], a view
    values = packing.cache.values[layer][low:high, :, : packing.keys]
    heads, kv_heads = queries.shape[1], keys.shape[1]

    q = queries if packing.aligned else queries.index_select(0, packing.cell_token)
    # [B, T, Hkv, G, D] -> [B, Hkv, G, T, D]: the G query heads of a key/value head share keys.
    q = q.reshape(batch, tokens, kv_heads, heads // kv_heads, -1).permute(0, 2, 3, 1, 4)
    out = _kernel(packing, q)(q, keys, values, packing.mask(window), scale)  # [B, Hkv, G, T, Dv]
    out = out.permute(0, 3, 1, 2, 4).reshape(batch * tokens, heads, -1)
    return out if packing.aligned else out.index_select(0, packing.short_cells)


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
