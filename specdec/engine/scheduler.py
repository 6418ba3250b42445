"""Who is in flight: the queue, the rows in slots, and the caches that hold them.

Rows that begin alike (samples of one prompt, one system prompt, one few-shot block) share what they
have in common: a row takes over keys and values that another slot holds of the same tokens, be its
row in flight or retired and not yet overwritten.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.model.cache import SlotCache, round_to_blocks
from specdec.policies.base import RowMemory
from specdec.request import Counts, Request, RoundTrace, SamplingParams

LEAST_SHARED = 32
"""Fewer tokens in common than this are not worth a forward of their own."""

OWN = 2
"""Last tokens of a row that it never takes over. Its first round then feeds a prompt's end and
yields one token, as it does without sharing: what is drawn does not depend on who is there."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common from their beginning."""
    n, most = 0, min(len(a), len(b))
    while n < most and a[n : n + 64] == b[n : n + 64]:  # many at once, not one by one in Python
        n += 64
    while n < most and a[n] == b[n]:
        n += 1
    return min(n, most)


@dataclass(slots=True, eq=False)
class LiveRow:
    """A request on its way.

    Attributes:
        request: as submitted.
        sampling: the request's, with max_new_tokens cut to what the context has room for.
        tokens: prompt and output so far. Caches hold a prefix of it, never the last token; what a
            cache lacks is pending.
        output_start: where the output begins in `tokens`.
        counts: what speculation did for it.
        memory: what the stop policy remembers about it.
        trace: its rounds, if they are kept.
        admitted: when it got a slot, by `time.perf_counter`.
    """

    request: Request
    sampling: SamplingParams
    tokens: list[int]
    output_start: int
    counts: Counts = field(default_factory=Counts)
    memory: RowMemory = field(default_factory=RowMemory)
    trace: list[RoundTrace] = field(default_factory=list)
    admitted: float = 0.0

    @property
    def generated(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.output_start

    @property
    def need(self) -> int:
        """Cache positions to reserve, so that the row can always finish."""
        return self.output_start + self.sampling.max_new_tokens


class Scheduler:
    """Admits waiting rows to slots as slots and memory allow, in order.

    All caches have one shape, slots x capacity, with at most `max_positions` positions; it is
    changed when the row at the head of the queue does not fit, so long rows trade slots for length.

    Args:
        caches: the target's and, if there is one, the draft's.
        slots: most rows in flight.
        max_positions: most cache positions over all slots.
        grain: rows share multiples of this many tokens of their prompts in the target's cache, or,
            if it is 1, whatever they have in common.
        least_shared: fewer tokens than this are not shared.

    Attributes:
        shared_tokens: positions of the target's cache that were taken over, not computed.
    """

    def __init__(
        self,
        caches: Sequence[SlotCache],
        slots: int,
        max_positions: int,
        grain: int = 1,
        least_shared: int = LEAST_SHARED,
    ) -> None:
        self.caches, self.slots, self.max_positions = caches, slots, max_positions
        self.grain, self.least_shared, self.shared_tokens = grain, least_shared, 0
        self.queue: deque[LiveRow] = deque()
        self._rows: list[LiveRow | None] = []  # by slot; None is a hole left by a retired row
        # Whose tokens each slot of the caches holds, as many as its length says: its row's, or
        # those of the row that left it last.
        self._held: list[LiveRow | None] = []

    @property
    def live(self) -> int:
        """Rows in slots."""
        return len(self._rows) - self._rows.count(None)

    @property
    def rows(self) -> list[LiveRow]:
        """The rows in slots, in the order of slots."""
        return [row for row in self._rows if row is not None]

    def admit(self) -> list[LiveRow]:
        """Give slots to waiting rows; return the live rows, in the order of slots 0..n-1."""
        while self.queue and self._reserve(self.queue[0].need):
            hole = self._rows.index(None) if None in self._rows else len(self._rows)
            row = self.queue.popleft()
            row.admitted = time.perf_counter()
            self._rows[hole : hole + 1] = [row]
            self._place(row, hole)
        self._compact()
        return self.rows

    def retire(self, slot: int) -> None:
        """Free a slot. What it holds stays there for others to share until it is overwritten."""
        self._rows[slot] = None

    def share(self, cache: SlotCache, slot: int) -> None:
        """Let a slot take over what another one holds of its row's tokens, if that is much more.

        Args:
            cache: one of `caches`.
            slot: of a live row; its length grows by what it took over.
        """
        row, length = self._held[slot], cache.lengths[slot]
        if row is None:
            return
        best, enough = slot, length + self.least_shared
        if enough > len(row.tokens) - OWN:
            return
        for source, other in enumerate(self._held):
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

    def common(self, cache: SlotCache, row: LiveRow, other: LiveRow) -> int:
        """How many tokens two rows may share in a cache.

        Its last ones are left to each row (`OWN`).
        """
        most = min(len(row.tokens), len(other.tokens)) - OWN
        n = max(0, min(common_prefix(row.tokens, other.tokens), most))
        if self.grain == 1 or cache is not self.caches[0]:
            return n
        return min(n, row.output_start, other.output_start) // self.grain * self.grain

    def _place(self, row: LiveRow, slot: int) -> None:
        """Give a slot to a row, with what the slot, or a better one, holds of its tokens."""
        before, self._held[slot] = self._held[slot], row
        for cache in self.caches:
            cache.rollback(slot, self.common(cache, row, before) if before is not None else 0)
            if cache.lengths[slot] < self.least_shared:
                cache.rollback(slot, 0)
            self._count(cache, cache.lengths[slot])
            self.share(cache, slot)

    def _count(self, cache: SlotCache, tokens: int) -> None:
        if cache is self.caches[0]:
            self.shared_tokens += tokens

    def _reserve(self, need: int) -> bool:
        """Whether one more row of `need` positions fits; reshape the caches if that helps."""
        live, shape = self.live, self.caches[0]
        if live >= self.slots:
            return False
        if need <= shape.capacity and live < shape.slots:
            return True
        least = max([need, *(row.need for row in self._rows if row is not None)])
        # Look ahead a batch, so that a run of growing prompts does not reshape them every time.
        ahead = max(row.need for row, _ in zip(self.queue, range(self.slots), strict=False))
        for capacity in (round_to_blocks(max(least, ahead)), round_to_blocks(least)):
            slots = min(self.slots, self.max_positions // capacity)
            if live < slots:
                self._compact()
                for cache in self.caches:
                    cache.resize(slots, capacity)
                self._held = [*self._held, *[None] * slots][:slots]
                return True
        return False

    def _compact(self) -> None:
        """Fill each hole with the last row, so that attention sees a rectangle without gaps."""
        for hole in reversed([slot for slot, row in enumerate(self._rows) if row is None]):
            last = self._rows.pop()
            if hole < len(self._rows):
                self._rows[hole] = self._held[hole] = last
                for cache in self.caches:
                    cache.move(len(self._rows), hole)
