"""The kernels for GPUs, in Triton.

On a GPU an operator costs a launch, whatever it computes, and torch runs some twenty of them a
layer. Attention reads each token's own slot up to itself, so that neither a grid nor a mask is
made. Nothing but the number of tokens shapes a forward: that is what lets specdec/model/graphs.py
record it.

When a model is loaded, `PackedDecoder` compares its logits with those of plain transformers, and
does without kernels where they differ.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.base import LayerKernels
from specdec.kernels.scoring import Scoring
from specdec.kernels.stored import LARGEST, LEAST, Scales

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of activations, and of caches unless they hold eight bits."""

KEYS = 64
"""Cached positions that a program looks at together: the width of its tile of scores.

More need more registers and shared memory for each program, fewer give tensor cores less to do.
"""

LEAST_DOT = 16
"""Tensor cores multiply tiles of at least so many rows; fewer are padded to it."""

ROW_TOKENS = 4
"""Tokens of a row that read its positions together: with the heads of a group, a tile's rows.

More read a long row's keys fewer times and divide its work among fewer programs.
"""

LOWEST = tl.constexpr(-1e30)
"""Less than any score, and unlike infinity equal to itself when it is subtracted."""

SMALLEST = tl.constexpr(LEAST)
"""What a head of zeros is scaled as if it had."""

MOST_SPLITS = 16
"""A token's positions are divided among at most so many programs, where tokens are few.

More keep a GPU busy with fewer rows, and leave more partial sums to put together.
"""

GATE_BLOCK = 1024
"""Numbers of a row that one program gates."""


class GpuKernels(LayerKernels):
    """Kernels for tensors on one GPU, in any of DTYPES."""

    row_tokens: int | None = ROW_TOKENS
    prompt_tokens = 0
    keys_by_dimension = False

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"  # else Triton's interpreter
        self._wanted = 2 * _processors(device) if cuda else 24

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        rows: Tensor,
        scoring: Scoring,
        window: int | None,
        out: Tensor,
        *,
        scales: Scales | None = None,
        chunked: bool = False,
        paths: Tensor | None = None,
    ) -> None:
        # What comes out for a token depends on R, but not on the other tokens.
        _, kv_heads, page, dim = keys.shape
        n, heads, _ = query.shape
        value_dim, group = values.shape[3], heads // kv_heads
        splits = 1
        while splits < MOST_SPLITS and len(rows) * kv_heads * splits < self._wanted:
            splits *= 2
        # Of each split, what it found and by which maximum and total it is weighted.
        mixed = query.new_empty(n, heads, splits, value_dim, dtype=torch.float32)
        sums = query.new_empty(n, heads, splits, 2, dtype=torch.float32)
        scale, softcap, sinks, bias = scoring
        key_scales, value_scales = scales or (sums, sums)
        _attend[(len(rows), kv_heads, splits)](
            query, query.stride(0), query.stride(1), keys, values, key_scales, value_scales,
            table, table.shape[1], rows, scale, softcap or 0.0, rows if bias is None else bias,
            0 if bias is None else bias.stride(0), window or 1 << 30,
            rows if paths is None else paths, n, mixed, sums, PAGE=page,
            SCALED=scales is not None, SOFTCAP=softcap is not None, BIAS=bias is not None,
            WINDOW=window is not None, CHUNKED=chunked, TREES=paths is not None,
            HEADS=heads, KV_HEADS=kv_heads, GROUP=group, DIM=dim, VALUE_DIM=value_dim,
            BLOCK=max(LEAST_DOT, triton.next_power_of_2(ROW_TOKENS * group)),
            DIM_BLOCK=triton.next_power_of_2(dim), VALUE_BLOCK=triton.next_power_of_2(value_dim),
            KEYS=KEYS, SPLITS=splits,
        )  # fmt: skip
        _combine[(len(rows), heads)](
            mixed, sums, rows, sums if sinks is None else sinks, out, SINKS=sinks is not None,
            HEADS=heads, VALUE_DIM=value_dim, VALUE_BLOCK=triton.next_power_of_2(value_dim),
            SPLITS=splits,
        )  # fmt: skip

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out, width = torch.empty_like(x), x.shape[-1]
        _add_norm[(x.numel() // width,)](
            x, x if y is None else y, weight, out, width, eps,
            ADD=y is not None, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        grid = (out.numel() // width, triton.cdiv(width, GATE_BLOCK))
        _gate[grid](gate_up, out, width, BLOCK=GATE_BLOCK)
        return out

    def rotate_and_store(
        self,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        norms: tuple[Tensor, Tensor, float] | None,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        slots: Tensor,
        positions: Tensor,
        scales: Scales | None = None,
    ) -> None:
        n, all_heads, dim = heads.shape
        kv_heads, page = keys.shape[1], keys.shape[2]
        query_norm, key_norm, eps = norms or (cos, cos, 0.0)
        key_scales, value_scales = scales or (cos, cos)
        _rotate_and_store[(n, all_heads)](
            heads, cos, sin, query_norm, key_norm, eps,
            keys, values, key_scales, value_scales,
            table, table.shape[1], slots, positions, PAGE=page,
            LARGEST=0.0 if scales is None else LARGEST[keys.dtype],
            WHOLE=not keys.dtype.is_floating_point, ALL_HEADS=all_heads, KV_HEADS=kv_heads, DIM=dim,
            HALF_BLOCK=triton.next_power_of_2(dim // 2), NORMS=norms is not None,
        )  # fmt: skip


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def _attend(
    query, token_stride, head_stride, keys, values, key_scales, value_scales, table, width, rows,
    scale, softcap, bias, bias_width, window, paths, tokens, mixed, sums, PAGE: tl.constexpr,
    SCALED: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr, TREES: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One split of a row's positions, for the query heads of its tokens that share a key head.

    Splits take blocks of positions in turn, so that a token's sums have the same order whatever
    other tokens its row has.

    With TREES, positions are looked at where they are stored: a token's mask says which of those
    from its base on are its own, and how many of these are before one.
    """
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    token, count = tl.load(rows + 4 * row), tl.load(rows + 4 * row + 1)
    slot, position = tl.load(rows + 4 * row + 2), tl.load(rows + 4 * row + 3)
    if count == 0:
        return
    end = position + count

    each, dims = tl.arange(0, BLOCK), tl.arange(0, DIM_BLOCK)
    value_dims, steps = tl.arange(0, VALUE_BLOCK), tl.arange(0, KEYS)
    within, heads = each // GROUP, kv_head * GROUP + each % GROUP
    ours, last = within < count, position + within
    if TREES:
        base = tl.load(paths + token + within, mask=ours, other=0)
        path = tl.load(paths + tokens + token + within, mask=ours, other=0)
        last = base + _bits(path) - 1
    first = tl.zeros_like(last)
    if WINDOW:
        first = last - last % window if CHUNKED else last + 1 - window
    earliest = tl.minimum(first, base) if TREES else first
    block = tl.maximum(tl.min(tl.where(ours, earliest, end), 0), 0) // KEYS
    block += (split + SPLITS - block % SPLITS) % SPLITS
    q = tl.load(
        query + (token + within)[:, None] * token_stride + heads[:, None] * head_stride
        + dims[None, :],
        mask=ours[:, None] & (dims < DIM)[None, :], other=0.0,
    )  # fmt: skip
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    found = tl.zeros([BLOCK, VALUE_BLOCK], tl.float32)
    for start in range(block * KEYS, end, SPLITS * KEYS):
        at = start + steps
        page = tl.load(table + slot * width + at // PAGE, mask=at < end, other=0)
        place = (page * KV_HEADS + kv_head) * PAGE + at % PAGE
        k = tl.load(
            keys + place[None, :] * DIM + dims[:, None],
            mask=(at < end)[None, :] & (dims < DIM)[:, None], other=0.0,
        )  # fmt: skip
        known = at[None, :]  # their positions
        if TREES:
            node = at[None, :] - base[:, None]
            bit = tl.minimum(tl.maximum(node, 0), 63)
            before = 0
            if WINDOW or BIAS:  # else no one asks how many
                before = _bits(path[:, None] & (((bit * 0 + 1) << bit) - 1))
            on_path = (node == bit) & (((path[:, None] >> bit) & 1) == 1)
            behind = tl.where(on_path, base[:, None] + before, end)
            known = tl.where(node < 0, known, behind)
        seen = (known <= last[:, None]) & (known >= first[:, None])
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        if SCALED:
            scores *= tl.load(key_scales + place, mask=at < end, other=0.0)[None, :]
        if SOFTCAP:
            scores = softcap * (1 - 2 / (1 + tl.exp(2 * scores / softcap)))
        if BIAS:
            to = bias + heads[:, None] * bias_width + known
            scores += tl.load(to, mask=seen, other=0.0)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(top - higher)
        v = tl.load(
            values + place[:, None] * VALUE_DIM + value_dims[None, :],
            mask=(at < end)[:, None] & (value_dims < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        total = total * fade + tl.sum(weights, 1)
        if SCALED:
            weights *= tl.load(value_scales + place, mask=at < end, other=0.0)[None, :]
        more = tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        found = found * fade[:, None] + more
        top = higher
    to = ((token + within) * HEADS + heads) * SPLITS + split
    tl.store(
        mixed + to[:, None] * VALUE_DIM + value_dims[None, :], found,
        mask=ours[:, None] & (value_dims < VALUE_DIM)[None, :],
    )  # fmt: skip
    tl.store(sums + 2 * to, top, mask=ours)
    tl.store(sums + 2 * to + 1, total, mask=ours)


@triton.jit
def _bits(x):
    """How many bits of 64-bit numbers are set."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (x * 0x0101010101010101) >> 56


@triton.jit
def _combine(
    mixed, sums, rows, sinks, out, SINKS: tl.constexpr,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """What the splits of one row and head found, put together; an empty split weighs nothing."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(rows + 4 * row)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, VALUE_BLOCK)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
    for token in range(first, first + tl.load(rows + 4 * row + 1)):
        each = (token * HEADS + head) * SPLITS + splits
        top, total = tl.load(sums + 2 * each), tl.load(sums + 2 * each + 1)
        highest = tl.max(top, 0)
        if SINKS:
            highest = tl.maximum(highest, sink)
        weights = tl.exp(top - highest)
        whole = tl.sum(total * weights, 0)
        if SINKS:
            whole += tl.exp(sink - highest)
        found = tl.load(
            mixed + each[:, None] * VALUE_DIM + dims[None, :], mask=(dims < VALUE_DIM)[None, :],
            other=0.0,
        )  # fmt: skip
        mean = tl.sum(found * weights[:, None], 0) / whole
        tl.store(
            out + (token * HEADS + head) * VALUE_DIM + dims, mean.to(out.dtype.element_ty),
            mask=dims < VALUE_DIM,
        )  # fmt: skip


@triton.jit
def _add_norm(x, y, weight, out, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One row; rounded where transformers' RMSNorm rounds."""
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < width
    numbers = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        more = tl.load(y + at, mask=inside, other=0.0)
        numbers = (numbers.to(tl.float32) + more.to(tl.float32)).to(numbers.dtype)
        tl.store(x + at, numbers, mask=inside)
    wide = numbers.to(tl.float32)
    normed = (wide / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)).to(numbers.dtype)
    scaled = normed * tl.load(weight + tl.arange(0, BLOCK), mask=inside, other=0.0)
    tl.store(out + at, scaled, mask=inside)


@triton.jit
def _gate(gate_up, out, width, BLOCK: tl.constexpr):
    """A block of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + 2 * row * width + at, mask=inside, other=0.0)
    up = tl.load(gate_up + (2 * row + 1) * width + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    opened = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * width + at, opened * up, mask=inside)


@triton.jit
def _rotate_and_store(
    heads, cos, sin, query_norm, key_norm, eps,
    keys, values, key_scales, value_scales, table, width, slots, positions, PAGE: tl.constexpr,
    LARGEST: tl.constexpr, WHOLE: tl.constexpr,
    ALL_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """One head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = DIM // 2
    FIRST_KEY: tl.constexpr = ALL_HEADS - 2 * KV_HEADS
    FIRST_VALUE: tl.constexpr = ALL_HEADS - KV_HEADS
    dims = tl.arange(0, HALF_BLOCK)
    inside = dims < HALF
    own = heads + (token * ALL_HEADS + head) * DIM
    low = tl.load(own + dims, mask=inside, other=0.0)
    high = tl.load(own + HALF + dims, mask=inside, other=0.0)
    kind = low.dtype
    position = tl.load(positions + token)
    page = tl.load(table + tl.load(slots + token) * width + position // PAGE)
    if head >= FIRST_VALUE:
        place = (page * KV_HEADS + head - FIRST_VALUE) * PAGE + position % PAGE
        _store(values, value_scales, place, low, high, dims, inside, HALF, LARGEST, WHOLE)
    else:
        left, right = low.to(tl.float32), high.to(tl.float32)
        if NORMS:
            size = tl.sqrt(tl.sum(left * left + right * right, 0) / DIM + eps)
            norm = query_norm if head < FIRST_KEY else key_norm
            weight_low = tl.load(norm + dims, mask=inside, other=0.0)
            weight_high = tl.load(norm + HALF + dims, mask=inside, other=0.0)
            left = ((left / size).to(kind) * weight_low).to(tl.float32)
            right = ((right / size).to(kind) * weight_high).to(tl.float32)
        c = tl.load(cos + token * DIM + dims, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + token * DIM + dims, mask=inside, other=0.0).to(tl.float32)
        turned_low, turned_high = left * c - right * s, right * c + left * s
        if head < FIRST_KEY:
            tl.store(own + dims, turned_low.to(kind), mask=inside)
            tl.store(own + HALF + dims, turned_high.to(kind), mask=inside)
        else:
            place = (page * KV_HEADS + head - FIRST_KEY) * PAGE + position % PAGE
            low, high = turned_low.to(kind), turned_high.to(kind)
            _store(keys, key_scales, place, low, high, dims, inside, HALF, LARGEST, WHOLE)


@triton.jit
def _store(
    numbers, scales, place, low, high, dims, inside,
    HALF: tl.constexpr, LARGEST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The halves of a head at its place; with LARGEST as specdec/kernels/stored.py quantises it."""
    if LARGEST > 0:
        low, high = low.to(tl.float32), high.to(tl.float32)
        scale = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 0)
        scale = tl.maximum(scale, SMALLEST) * (1 / LARGEST)
        tl.store(scales + place, scale)
        low, high = tl.div_rn(low, scale), tl.div_rn(high, scale)
        if WHOLE:
            low, high = tl.floor(low + 0.5), tl.floor(high + 0.5)
    kind: tl.constexpr = numbers.dtype.element_ty
    tl.store(numbers + place * 2 * HALF + dims, low.to(kind), mask=inside)
    tl.store(numbers + place * 2 * HALF + HALF + dims, high.to(kind), mask=inside)
