"""Attention of a packed batch: rows of different lengths, laid end to end, over a `SlotCache`.

transformers calls `packed_attention` in place of its own. There are three ways to compute it:

- Rows of at most GRID_TOKENS tokens (decoding, verifying) and trees go to compiled kernels where
  there are any (specdec/kernels), token by token. So do prompts up to where torch is faster.
- Elsewhere such rows are computed together as a grid (specdec/model/grid.py).
- Longer rows are computed one by one, so that a row's shapes depend on that row alone.

Batch invariance. The compiled CPU kernel computes each token by itself, in an order that depends on
its position alone, and so does the grid if it is asked to. With linear layers that are invariant
row by row (specdec/model/linear.py) a token's logits are then bit-equal alone, verified among
others, or packed with other rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from specdec.kernels.scoring import Scoring
from specdec.model.grid import product_attention
from specdec.model.packing import Packing
from specdec.model.rows import PackedRow

ATTENTION = "specbatch_packed"
"""The name under which transformers knows `packed_attention`."""

QUERY_BLOCK = 64
"""Tokens of a long row whose scores are in memory at once where they are not `Scoring.plain`.

Raised, fewer products and more memory: heads x QUERY_BLOCK x positions numbers.
"""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    packing: Packing,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    key_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed batch, called by each transformers attention layer.

    How far back a token may look is the layer's `LayerLayout.window`, whatever the layer says here.

    Args:
        query: [1, H, N, D]; key: [1, Hkv, N, D]; value: [1, Hkv, N, Dv]; after rotary embedding.
        packing: where the N tokens belong; passed to the model as a keyword argument.
        softcap, s_aux, key_bias: soft cap, sinks and bias of `Scoring`.

    Returns:
        [1, N, H, Dv] and None.
    """
    layer = packing.layer_of(module)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scoring = Scoring(scale, softcap, s_aux, key_bias)
    return attend(packing, layer, q, k, v, scoring)[None], None


def attend(
    packing: Packing, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Write N keys and values to their slots and let each token attend to its own slot.

    Args:
        packing: where the N tokens belong.
        layer: index of the layer in the cache.
        query: [N, H, D]; key: [N, Hkv, D]; value: [N, Hkv, Dv]; after rotary embedding.
        scoring: of the layer.

    Returns:
        [N, H, Dv].
    """
    packing.cache.write(layer, key, value, packing.places)
    return attend_stored(packing, layer, query, scoring)


def attend_stored(packing: Packing, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
    """As `attend`, for tokens whose keys and values are in their slots already."""
    cache = packing.cache
    layout = cache.layout[layer]
    keys, values = cache.keys[layer], cache.values[layer]
    kernels = packing.kernels if query.dtype == cache.dtype else None
    if kernels is None and not packing.long:
        return packing.grid.attend(query, cache, layer, scoring)
    out = query.new_empty(*query.shape[:2], values.shape[3])
    if kernels is not None and len(packing.kernel_rows):
        query = query if query.stride(-1) == 1 else query.contiguous()
        kernels.attend(
            query, keys, values, cache.table, packing.kernel_rows, scoring, layout.window, out,
            scales=cache.scales(layer), chunked=layout.chunked, paths=packing.paths,
        )  # fmt: skip
    elif packing.short:
        grid = packing.grid
        out[grid.short_tokens] = grid.attend(query, cache, layer, scoring)
    for row in packing.apart if kernels is not None else packing.long:
        out[row.begin : row.begin + row.tokens] = _long_row(query, packing, row, layer, scoring)
    return out


def _long_row(
    queries: Tensor,
    packing: Packing,
    row: PackedRow,
    layer: int,
    scoring: Scoring,
) -> Tensor:
    """Attention of one long row: [n, H, Dv] from packed queries [N, H, D]."""
    cache, n = packing.cache, row.tokens
    q = queries[row.begin : row.begin + n].transpose(0, 1)[None]
    keys, values = cache.read(layer, slice(row.slot, row.slot + 1), row.start + n)
    layout, mask = cache.layout[layer], None
    if row.start or layout.window is not None or not scoring.plain:
        at = torch.arange(row.start, row.start + n, device=q.device)[:, None]
        mask = layout.sees(at, torch.arange(row.start + n, device=q.device))
    if mask is not None and not scoring.plain:
        return _in_blocks(q[0], keys.to(q.dtype), values.to(q.dtype), mask, scoring)
    out = F.scaled_dot_product_attention(
        q,
        keys.to(q.dtype),
        values.to(q.dtype),
        mask,
        is_causal=mask is None,
        scale=scoring.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _in_blocks(
    query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor, scoring: Scoring
) -> Tensor:
    """Attention of one row that no kernel of torch computes, QUERY_BLOCK tokens at a time.

    Args:
        query: [H, n, D]; keys: [1, Hkv, L, D]; values: [1, Hkv, L, Dv]; allowed: bool [n, L].

    Returns:
        [n, H, Dv].
    """
    grouped = query.reshape(1, keys.shape[1], -1, *query.shape[1:])
    mask = torch.zeros(allowed.shape, device=query.device).masked_fill_(~allowed, float("-inf"))
    outs = [
        product_attention(q, keys, values, scoring.biased(part[None]), scoring)
        for q, part in zip(
            torch.split(grouped, QUERY_BLOCK, 3), torch.split(mask, QUERY_BLOCK), strict=True
        )
    ]
    return torch.cat(outs, 3)[0].flatten(0, 1).transpose(0, 1)


AttentionInterface.register(ATTENTION, packed_attention)
