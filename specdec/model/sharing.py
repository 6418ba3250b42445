"""Rows that begin alike share what they have in common: its keys and values are computed once.

Samples of one prompt, one system prompt, one few-shot block: a row takes over the keys and values
that another slot holds of the same tokens, be its row in flight or retired and not yet overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specdec.model.cache import SlotCache

LEAST_SHARED = 32
"""Fewest tokens that rows share.

A shared beginning is a forward of its own, which reads all weights once more; a shorter one costs
more than it saves. Larger: fewer forwards, more tokens computed twice.
"""

OWN = 2
"""Last tokens of a row that it never takes over.

Its first round then feeds a prompt's end and yields one token, as it does without sharing: what is
drawn does not depend on who is there.
"""


class TokenRow(Protocol):
    """What sharing looks at of a row: its tokens, of which the first `output_start` are prompt."""

    tokens: list[int]
    output_start: int


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common from their beginning."""
    n, most = 0, min(len(a), len(b))
    while n < most and a[n : n + 64] == b[n : n + 64]:  # many at once, not one by one in Python
        n += 64
    while n < most and a[n] == b[n]:
        n += 1
    return min(n, most)


class SharedCaches:
    """The caches of all models, and whose tokens each of their slots holds.

    All caches have one shape. They hold the same rows in the same slots, each its own prefix of a
    row's tokens.

    Args:
        caches: the target's first.
        grain: rows share multiples of this many tokens of their prompts in the target's cache, or,
            if it is 1, whatever they have in common.
        least: fewer tokens than this are not shared.

    Attributes:
        taken_over: positions of the target's cache that were copied, not computed.
    """

    def __init__(
        self, caches: Sequence[SlotCache], grain: int = 1, least: int = LEAST_SHARED
    ) -> None:
        self.caches, self.grain, self.least, self.taken_over = caches, grain, least, 0
        # Of each slot its row, or the one that left it last: its tokens are there still.
        self._owners: list[TokenRow | None] = []

    def place(self, row: TokenRow, slot: int) -> None:
        """Give a slot to a row, with what the slot, or a better one, holds of its tokens."""
        before, self._owners[slot] = self._owners[slot], row
        for cache in self.caches:
            cache.rollback(slot, self.common(cache, row, before) if before is not None else 0)
            if cache.lengths[slot] < self.least:
                cache.rollback(slot, 0)
            self._count(cache, cache.lengths[slot])
            self.take_over(cache, slot)

    def take_over(self, cache: SlotCache, slot: int) -> None:
        """Copy to a slot what another one holds of its row's tokens, if that is much more.

        Args:
            cache: one of `caches`.
            slot: of a live row; its length grows by what it took over.
        """
        row, length = self._owners[slot], cache.lengths[slot]
        if row is None:
            return
        best, enough = slot, length + self.least
        if enough > len(row.tokens) - OWN:
            return
        for source, other in enumerate(self._owners):
            # Most of many slots hold too little or begin otherwise; that is quick to see.
            if other is None or other is row or cache.lengths[source] < enough:
                continue
            if other.tokens[:enough] != row.tokens[:enough]:
                continue
            most = min(self.common(cache, row, other), cache.lengths[source])
            if most >= enough:
                best, enough = source, most + 1
        if best != slot:
            cache.fork(best, [slot], [enough - 1])
            self._count(cache, enough - 1 - length)

    def common(self, cache: SlotCache, row: TokenRow, other: TokenRow) -> int:
        """How many tokens two rows may share in a cache.

        Its last ones are left to each row (`OWN`).
        """
        most = min(len(row.tokens), len(other.tokens)) - OWN
        n = max(0, min(common_prefix(row.tokens, other.tokens), most))
        if self.grain == 1 or cache is not self.caches[0]:
            return n
        return min(n, row.output_start, other.output_start) // self.grain * self.grain

    def rollback(self, slot: int, length: int) -> None:
        """Forget the tokens of `slot` from position `length` on, in all caches."""
        for cache in self.caches:
            cache.rollback(slot, length)

    def scrub(self, slot: int) -> None:
        """Zero what lies behind the tokens of `slot`, in all caches."""
        for cache in self.caches:
            cache.scrub(slot)

    def move(self, source: int, target: int) -> None:
        """Move the row in slot `source` to slot `target`, which it overwrites."""
        self._owners[target] = self._owners[source]
        for cache in self.caches:
            cache.move(source, target)

    def resize(self, slots: int, capacity: int) -> None:
        """Take another shape, keeping what fits of each slot."""
        for cache in self.caches:
            cache.resize(slots, capacity)
        self._owners = [*self._owners, *[None] * slots][:slots]

    def _count(self, cache: SlotCache, tokens: int) -> None:
        if cache is self.caches[0]:
            self.taken_over += tokens
