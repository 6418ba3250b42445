"""Feeding a model what it lacks of rows before a round: long tails, and shared beginnings once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from specdec.model.cache import SlotCache
from specdec.model.packing import GRID_TOKENS
from specdec.model.rows import Row, upload
from specdec.model.sharing import SharedCaches, TokenRow


class Fed(Protocol):
    """What is fed: a `PackedDecoder`, or what else reads tokens behind those that a cache holds."""

    invariant: bool

    def forward(self, cache: SlotCache, rows: Sequence[Row], tokens: Tensor) -> Tensor:
        """Append tokens to slots; see `PackedDecoder.forward`."""


def feed(
    decoder: Fed, cache: SlotCache, slot: int, row: TokenRow, length: int, chunk: int
) -> list[int]:
    """Feed a row's tokens up to `length`, at most `chunk` in a forward.

    With a batch-invariant model, output is fed in rows as short as those that generated it.

    Args:
        decoder: the model.
        cache: its cache; `slot` grows.
        slot: where the row is.
        row: whose tokens.
        length: how many positions the slot shall hold; it may hold more already.
        chunk: most tokens of a forward.

    Returns:
        Tokens of each forward.
    """
    forwards = []
    while (fed := cache.lengths[slot]) < length:
        end = min(fed + chunk, length)
        if decoder.invariant:
            end = min(end, row.output_start if fed < row.output_start else fed + GRID_TOKENS)
        (tokens,) = upload(cache.device, row.tokens[fed + cache.ahead : end + cache.ahead])
        decoder.forward(cache, [(slot, len(tokens))], tokens)
        forwards.append(len(tokens))
    return forwards


def feed_again(
    decoder: Fed,
    cache: SlotCache,
    rows: Sequence[TokenRow],
    chunk: int,
) -> list[int]:
    """Feed rows with output all but their last token; only those that were sent back lack more.

    Such a row goes on as if it had stayed: what it draws next is what it would have drawn.

    Args:
        decoder: the model.
        cache: its cache.
        rows: the live rows, by slot.
        chunk: most tokens of a forward.

    Returns:
        Tokens of each forward.
    """
    forwards = []
    for slot, row in enumerate(rows):
        if row.output_start < len(row.tokens) > cache.lengths[slot] + 1:
            forwards += feed(decoder, cache, slot, row, len(row.tokens) - 1, chunk)
    return forwards


def feed_ahead(
    decoder: Fed,
    cache: SlotCache,
    shared: SharedCaches,
    rows: Sequence[TokenRow],
    slots: Sequence[int],
    chunk: int,
) -> list[int]:
    """Feed what rows share, and all but the last chunk of what is long; arguments and result are
    those of `feed_shared`.
    """
    forwards = feed_shared(decoder, cache, shared, rows, slots, chunk)
    for slot in slots:
        length = len(rows[slot].tokens) - cache.ahead - chunk
        forwards += feed(decoder, cache, slot, rows[slot], length, chunk)
    return forwards


def feed_shared(
    decoder: Fed,
    cache: SlotCache,
    shared: SharedCaches,
    rows: Sequence[TokenRow],
    slots: Sequence[int],
    chunk: int,
) -> list[int]:
    """Feed the long beginnings that rows have in common and lack, each to one row; copy the rest.

    Args:
        decoder: the model.
        cache: its cache.
        shared: the caches of all models, `cache` among them.
        rows: the live rows, by slot.
        slots: the rows that are about to be fed; others only take over what these leave.
        chunk: most tokens of a forward.

    Returns:
        Tokens of each forward. What rows lack beyond their common beginnings is still pending.
    """
    least, forwards = shared.least, list[int]()
    lacking = {s for s, row in enumerate(rows) if len(row.tokens) - cache.lengths[s] > least}
    for slot in (slot for slot in slots if slot in lacking):
        shared.take_over(cache, slot)
        others = [o for o in shared.alike(rows[slot]) if o in lacking and o != slot]
        common = {o: shared.common(cache, rows[slot], rows[o]) for o in others}
        gaining = [other for other, n in common.items() if n - cache.lengths[other] >= least]
        most = max((common[other] for other in gaining), default=0)
        if most - cache.lengths[slot] >= least:
            forwards += feed(decoder, cache, slot, rows[slot], most, chunk)
            for other in gaining:
                shared.take_over(cache, other)
    return forwards
