"""Attention of short rows together, on torch's operators: a grid over a range of slots.

Keys and values of a contiguous range of slots are copied out of their pages, layer by layer. With
`invariant` every reduction has a shape that does not depend on the batch. Each query token is its
own batch item, keys come in blocks of KEY_BLOCK that are accumulated in order, and blocks behind a
row's end add exact zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels.scoring import Scoring
from specdec.model.cache import KEY_BLOCK, LayerLayout, SlotCache
from specdec.model.rows import PackedRow, upload
from specdec.model.trees import positions_of

MANY_ROWS = 16
"""From so many rows on, batched products are faster than torch's fused kernel on a CPU.

In bfloat16 only; float32 always takes the products. Raised, more batches get the fused kernel.
"""

KEY_STEP = 16
"""Attended positions are rounded up to a multiple of this, so that there are few shapes.

Raised, there are fewer shapes and more masked positions to compute.
"""


Product = Callable[[Tensor, Tensor, Tensor, Tensor, Scoring], Tensor]
"""Attention of queries to keys and values under a mask: `product_attention` and others."""


@dataclass(slots=True)
class Grid:
    """Short rows as a batch of one shape over a contiguous range of slots; built once per forward.

    Attributes:
        invariant: whether a token's bits must not depend on the other rows.
        slots: the range [low, high) of slots that the grid covers; B = high - low.
        tokens: T, tokens per grid row.
        keys: L, positions attended: a multiple of KEY_STEP; if invariant, of KEY_BLOCK.
        cell_token: int64 [B * T], the packed token in each cell (any token in an unused cell).
        cell_position: int64 [B, T], that token's position.
        seen_position: int64 [B, T, L], in trees, the positions that stored keys have for a cell.
        short_tokens, short_cells: int64 [n], packed tokens of the grid and their cells.
        aligned: the packed tokens are exactly the cells in order.
    """

    invariant: bool
    slots: tuple[int, int]
    tokens: int
    keys: int
    cell_token: Tensor
    cell_position: Tensor
    seen_position: Tensor | None
    short_tokens: Tensor
    short_cells: Tensor
    aligned: bool
    _masks: dict[tuple[int | None, bool, int], Tensor] = field(default_factory=dict)

    @classmethod
    def lay_out(
        cls,
        rows: Sequence[PackedRow],
        positions: Tensor,
        paths: Tensor | None,
        *,
        invariant: bool,
    ) -> Grid:
        """The grid of some rows out of packed tokens with `positions` [N] and `paths` [2, N]."""
        low, high = min(row.slot for row in rows), max(row.slot for row in rows) + 1
        width = max(row.tokens for row in rows)
        step = KEY_BLOCK if invariant else KEY_STEP
        keys = -(-max(row.start + row.tokens for row in rows) // step) * step
        cell_token = [0] * ((high - low) * width)
        short_tokens: list[int] = []
        short_cells: list[int] = []
        for begin, count, slot, _ in rows:
            cell = (slot - low) * width
            cell_token[cell : cell + count] = range(begin, begin + count)
            short_tokens += range(begin, begin + count)
            short_cells += range(cell, cell + count)
        on_device = upload(positions.device, cell_token, short_tokens, short_cells)
        cells, shape = on_device[0], (high - low, width)
        seen = None if paths is None else positions_of(paths[:, cells].view(2, *shape), keys)
        return cls(
            invariant,
            (low, high),
            width,
            keys,
            cell_token=cells,
            cell_position=positions[cells].view(shape),
            seen_position=seen,
            short_tokens=on_device[1],
            short_cells=on_device[2],
            aligned=cell_token == list(range(len(positions))),
        )

    def attend(self, query: Tensor, cache: SlotCache, layer: int, scoring: Scoring) -> Tensor:
        """Attention of all rows of the grid.

        Args:
            query: [N, H, D], of all packed tokens.
            cache, layer: where their keys and values are.
            scoring: of the layer.

        Returns:
            [n, H, Dv] for the n short tokens, in packed order.
        """
        low, high = self.slots
        batch, tokens = high - low, self.tokens
        keys, values = cache.read(layer, slice(low, high), self.keys)  # [B, Hkv, L, D]
        heads, kv_heads = query.shape[1], keys.shape[1]

        q = query if self.aligned else query.index_select(0, self.cell_token)
        # [B, T, Hkv, G, D] -> [B, Hkv, G, T, D]: the G query heads of a key/value head share keys.
        q = q.reshape(batch, tokens, kv_heads, heads // kv_heads, -1).permute(0, 2, 3, 1, 4)
        mask = self._mask(cache.layout[layer], scoring)
        if self.invariant and self.seen_position is not None:
            out = self._in_order(q, keys, values, mask, scoring)
        else:
            out = self._product(q, scoring)(q, keys, values, mask, scoring)  # [B, Hkv, G, T, Dv]
        out = out.permute(0, 3, 1, 2, 4).reshape(batch * tokens, heads, -1)
        return out if self.aligned else out.index_select(0, self.short_cells)

    def _in_order(
        self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scoring: Scoring
    ) -> Tensor:
        """As `invariant_attention`, each cell over keys and values in the order of its path."""
        assert self.seen_position is not None
        outs = []
        for t, positions in enumerate(self.seen_position.unbind(1)):
            order = positions.argsort(dim=-1, stable=True)[:, None, :, None]
            own_keys, own_values = keys.take_along_dim(order, 2), values.take_along_dim(order, 2)
            one, own_mask = q[:, :, :, t : t + 1], mask[:, :, t : t + 1]
            outs.append(invariant_attention(one, own_keys, own_values, own_mask, scoring))
        return torch.cat(outs, 3)

    def _product(self, q: Tensor, scoring: Scoring) -> Product:
        if self.invariant:
            return invariant_attention
        many = q.device.type == "cpu" and len(q) >= MANY_ROWS
        products = q.dtype == torch.float32 or many or not scoring.plain
        return product_attention if products else fused_attention

    def _mask(self, layout: LayerLayout, scoring: Scoring) -> Tensor:
        """Additive float32 [B, H or 1, T, L], -inf where a cell may not attend.

        It is made once a forward for each kind of layer.
        """
        span = layout.window, layout.chunked, id(scoring.key_bias)
        if span not in self._masks:
            key, at = torch.arange(self.keys, device=self.cell_position.device), None
            if not self.invariant and self.seen_position is not None:
                key = at = self.seen_position
            zero = torch.zeros((), device=key.device)
            allowed = layout.sees(self.cell_position[..., None], key)
            self._masks[span] = scoring.biased(torch.where(allowed, zero, float("-inf")), at)
        return self._masks[span]


def product_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scoring: Scoring
) -> Tensor:
    """Softmax attention as two batched matrix products, the softmax in float32.

    Args:
        q: [B, Hkv, G, T, D]; keys: [B, Hkv, L, D]; values: [B, Hkv, L, Dv];
            mask: [B, H or 1, T, L].

    Returns:
        [B, Hkv, G, T, Dv].
    """
    batch, kv_heads, group, tokens, _ = q.shape
    flat, keys = q.reshape(batch * kv_heads, group * tokens, -1), keys.flatten(0, 1)
    if q.dtype == torch.float32:
        scores = torch.bmm(flat * scoring.scale, keys.transpose(1, 2))
    else:  # CPUs multiply bfloat16 three times as fast with the many keys on the left
        scores = torch.bmm(keys, flat.transpose(1, 2)).transpose(1, 2).contiguous()
        scores = scores.float().mul_(scoring.scale)
    by_head = scoring.capped(scores).view(batch, kv_heads * group, tokens, -1).add_(mask)
    weights = scoring.weights(by_head).to(values.dtype).reshape(scores.shape)
    out = torch.bmm(weights, values.flatten(0, 1))
    return out.view(batch, kv_heads, group, tokens, -1)


def fused_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scoring: Scoring
) -> Tensor:
    """As `product_attention`, in torch's fused kernel; scoring is plain, the mask [B, 1, T, L]."""
    batch, kv_heads, group, tokens, _ = q.shape
    flat = q.reshape(batch, kv_heads, group * tokens, -1)
    repeated = mask.to(q.dtype).repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(flat, keys, values, repeated, scale=scoring.scale)
    return out.view(batch, kv_heads, group, tokens, -1)


def invariant_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scoring: Scoring
) -> Tensor:
    """As `product_attention`, bit-equal for a token whatever B, T and L are.

    The products are [G, D] x [D, KEY_BLOCK] and [G, KEY_BLOCK] x [KEY_BLOCK, Dv] in every case;
    sums over blocks run in order, and a block past a row's end adds exact zeros. The maximum is
    exact in any order.
    """
    batch, kv_heads, group, tokens, dim = q.shape
    key_blocks = torch.split(keys.float().flatten(0, 1), KEY_BLOCK, 1)
    value_blocks = torch.split(values.float().flatten(0, 1), KEY_BLOCK, 1)
    outs = []
    for t in range(tokens):
        qt = (q[:, :, :, t].float() * scoring.scale).reshape(batch * kv_heads, group, dim)
        scores = torch.cat([torch.bmm(qt, block.transpose(1, 2)) for block in key_blocks], -1)
        scores = scoring.capped(scores)
        scores.view(batch, kv_heads * group, -1).add_(mask[:, :, t])
        highest = scores.amax(-1, keepdim=True)
        sinks = scoring.sink_scores(scores.view(batch, kv_heads * group, 1, -1))
        if sinks is not None:
            sinks = sinks.reshape(highest.shape)
            highest = torch.maximum(highest, sinks)
        weights = torch.split(torch.exp(scores - highest), KEY_BLOCK, -1)
        total = weights[0].sum(-1, keepdim=True)
        if sinks is not None:
            total += torch.exp(sinks - highest)
        out = torch.bmm(weights[0], value_blocks[0])
        for weight, block in zip(weights[1:], value_blocks[1:], strict=True):
            total += weight.sum(-1, keepdim=True)
            out += torch.bmm(weight, block)
        outs.append((out / total).view(batch, kv_heads, group, -1))
    return torch.stack(outs, 3).to(q.dtype)
