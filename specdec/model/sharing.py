"""Rows that begin alike share what they have in common: its keys and values are computed once.

Samples of one prompt, one system prompt, one few-shot block: a row shares the pages in which
another slot holds the same tokens, or in which a row that has left held them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Protocol

from specdec.model.cache import SlotCache
from specdec.model.pages import PAGE, OutOfPages, pages_of

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

    @property
    def sharable(self) -> int:
        """How many of its first tokens others may have computed for it, or it for them."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common from their beginning."""
    n, most = 0, min(len(a), len(b))
    while n < most and a[n : n + 64] == b[n : n + 64]:  # many at once, not one by one in Python
        n += 64
    while n < most and a[n] == b[n]:
        n += 1
    return min(n, most)


def _computed_of(cache: SlotCache, tokens: Sequence[int]) -> Sequence[Hashable]:
    """What each position of a row in a cache is computed of, besides the positions before it."""
    return [*zip(tokens, tokens[cache.ahead :], strict=False)] if cache.ahead else tokens


class SharedCaches:
    """The caches of all models, and whose tokens each of their slots holds.

    They hold the same rows in the same slots, each its own prefix of a row's tokens, and have
    equally many pages.

    Args:
        caches: the target's first.
        grain: rows share multiples of this many tokens of their prompts in the target's cache, or,
            if it is 1, whatever they have in common.
        least: fewer tokens than this are not shared.

    Attributes:
        taken_over: positions of the target's cache that were shared, not computed.
    """

    def __init__(
        self, caches: Sequence[SlotCache], grain: int = 1, least: int = LEAST_SHARED
    ) -> None:
        self.caches, self.grain, self.least, self.taken_over = caches, grain, least, 0
        self._owners: list[TokenRow | None] = []  # by slot
        self._alike = defaultdict[tuple[int, ...], set[int]](set)  # slots, by how rows begin

    def place(self, row: TokenRow, slot: int, positions: int) -> bool:
        """Give an empty slot, and pages for so many positions, to a row if there are enough.

        It begins with what others hold, or have left, of its tokens.
        """
        before = self.taken_over
        self._enter(row, slot)
        try:
            for cache in self.caches:
                pages, length = self._left_behind(cache, row)
                if length >= self.least:
                    cache.adopt(slot, pages, length)
                    self._count(cache, length)
                self.take_over(cache, slot)
            placed = self.extend(slot, positions)
        except OutOfPages:
            placed = False
        if not placed:
            self.taken_over = before
            self.release(slot)
        return placed

    def _left_behind(self, cache: SlotCache, row: TokenRow) -> tuple[list[int], int]:
        """Pages that are found by a row's first tokens, and how many tokens of them to take."""
        most = self._in_grains(cache, max(0, row.sharable), row)
        pages = cache.pages.find(_computed_of(cache, row.tokens[:most]))
        return pages, self._in_grains(cache, len(pages) * PAGE, row)

    def take_over(self, cache: SlotCache, slot: int) -> None:
        """Let a slot share what another one holds of its row's tokens, if that is much more.

        Args:
            cache: one of `caches`.
            slot: of a live row; its length grows by what it took over.
        """
        row, length = self._owners[slot], cache.lengths[slot]
        if row is None:
            return
        source, most = self._best(cache, row, length + self.least)
        if source is not None:
            cache.fork(source, [slot], [most])
            self._count(cache, most - length)

    def _best(self, cache: SlotCache, row: TokenRow, enough: int) -> tuple[int | None, int]:
        """The slot that holds most of a row's tokens, and how many, if that is `enough`."""
        best, most = None, enough - 1
        if row.sharable < enough:
            return best, most
        for source in self.alike(row):
            other = self._owners[source]
            if other is None or other is row or cache.lengths[source] <= most:
                continue
            # Rows of a template go apart at one place: one token tells whether that is further on.
            if row.tokens[most : most + 1] != other.tokens[most : most + 1]:
                continue
            if other.tokens[:most] != row.tokens[:most]:
                continue
            n = min(self.common(cache, row, other), cache.lengths[source])
            if n > most and cache.holds(source, n):
                best, most = source, n
        return best, most

    def alike(self, row: TokenRow) -> list[int]:
        """The slots, rising, of rows whose prompts begin as this one's; others share nothing."""
        return sorted(self._alike.get(self._begin(row), ()))

    def _begin(self, row: TokenRow) -> tuple[int, ...]:
        return tuple(row.tokens[: min(self.least, row.output_start)])

    def common(self, cache: SlotCache, row: TokenRow, other: TokenRow) -> int:
        """How many positions two rows may share in a cache."""
        most = max(0, min(row.sharable, other.sharable))
        n = min(common_prefix(row.tokens, other.tokens), most) if most else 0
        shared = min(self._in_grains(cache, n, row), self._in_grains(cache, n, other))
        return max(0, shared - cache.ahead)

    def _in_grains(self, cache: SlotCache, tokens: int, row: TokenRow) -> int:
        """How many of a row's first tokens others may share."""
        if self.grain == 1 or cache is not self.caches[0]:
            return tokens
        return min(tokens, row.output_start) // self.grain * self.grain

    def fresh(self, row: TokenRow, positions: int) -> int:
        """How many unused pages it takes to place a row and hold so many positions of it."""
        most = 0
        for cache in self.caches:
            pages, length = self._left_behind(cache, row)
            shared = sum(cache.pages.used(page) for page in pages[: length // PAGE])
            if length < self.least:
                shared = 0
            _, alive = self._best(cache, row, self.least)
            most = max(most, pages_of(positions) - max(shared, alive // PAGE))
        return most

    def extend(self, slot: int, positions: int) -> bool:
        """Give a slot pages for so many positions in all caches; whether there are enough."""
        pools = [cache.pages for cache in self.caches]
        if any(pool.lacking(slot, positions) > pool.available for pool in pools):
            return False
        for pool in pools:
            pool.extend(slot, positions)
        return True

    @property
    def available(self) -> int:
        """Pages that no slot uses, in the cache that has fewest."""
        return min(cache.pages.available for cache in self.caches)

    @property
    def pages(self) -> int:
        """Pages of each cache."""
        return self.caches[0].pages.total

    def rollback(self, slot: int, length: int) -> None:
        """Forget what is computed of the tokens of `slot` from `length` on, in all caches."""
        for cache in self.caches:
            left = max(0, length - cache.ahead)
            if cache.lengths[slot] > left or cache.states is not None:
                cache.rollback(slot, left)

    def scrub(self, slot: int, length: int) -> None:
        """Zero what `slot` alone has written of its tokens from `length` on, in all caches."""
        for cache in self.caches:
            cache.scrub(slot, max(0, length - cache.ahead))

    def release(self, slot: int) -> None:
        """Take a slot from its row. What it holds stays for others until its pages are needed."""
        row = self._leave(slot)
        for cache in self.caches:
            if cache.states is None:  # pages say nothing of states, which go with the slot
                n = self._in_grains(cache, cache.lengths[slot], row)
                cache.pages.publish(slot, _computed_of(cache, row.tokens[: n + cache.ahead]))
            cache.release(slot)

    def move(self, source: int, target: int) -> None:
        """Move the row in slot `source` to the empty slot `target`."""
        self._enter(self._leave(source), target)
        for cache in self.caches:
            cache.move(source, target)

    def _enter(self, row: TokenRow, slot: int) -> None:
        self._owners[slot] = row
        self._alike[self._begin(row)].add(slot)

    def _leave(self, slot: int) -> TokenRow:
        """Take a slot from its row, which is returned."""
        row, self._owners[slot] = self._owners[slot], None
        assert row is not None, "the slot has a row"
        begin = self._begin(row)
        self._alike[begin].remove(slot)
        if not self._alike[begin]:
            del self._alike[begin]
        return row

    def grow(self, slots: int, capacity: int, pages: int) -> None:
        """Have at least so many slots, positions in each, and pages in each cache."""
        for cache in self.caches:
            cache.grow(slots, capacity, pages)
        self._owners += [None] * (slots - len(self._owners))

    def _count(self, cache: SlotCache, tokens: int) -> None:
        if cache is self.caches[0]:
            self.taken_over += tokens
