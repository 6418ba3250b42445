"""Who is in flight: the queue, and the rows in slots."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from specdec.engine.ending import Ending, StopSearch
from specdec.lossless.grammars import RowGrammar
from specdec.model.cache import round_to_blocks
from specdec.model.sharing import SharedCaches
from specdec.policies.base import RowMemory
from specdec.request import Completion, Counts, Request, RoundTrace, SamplingParams, TokenLogprob


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
        stops: looks for its stop strings, if it has any.
        memory: what the stop policy remembers about it.
        doubtful: whether its last round failed with candidates; the next one has none.
        trace: its rounds, if they are kept.
        admitted: when it got a slot, by `time.perf_counter`.
        grammar: what its output is, if it asks for that; made when it gets a slot.
        logprobs: of its output tokens, if it asks for them.
        prompt_logprobs: of its prompt's, if it asks for them; read when it gets a slot.
        adjusts: whether it asks for anything of its logits.
    """

    request: Request
    sampling: SamplingParams
    tokens: list[int]
    output_start: int
    stops: StopSearch | None = None
    counts: Counts = field(default_factory=Counts)
    memory: RowMemory = field(default_factory=RowMemory)
    doubtful: bool = False
    trace: list[RoundTrace] = field(default_factory=list)
    admitted: float = 0.0
    grammar: RowGrammar | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    adjusts: bool = field(init=False)

    def __post_init__(self) -> None:
        self.adjusts = self.sampling.adjusts

    @property
    def generated(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.output_start

    @property
    def need(self) -> int:
        """Cache positions to reserve, so that the row can always finish."""
        return self.output_start + self.sampling.max_new_tokens

    def completed(self, ending: Ending, ended: float) -> Completion:
        """What became of the request; it ended at `ended`, by `time.perf_counter`."""
        length = 0 if ending.error is not None else ending.length
        output = self.tokens[self.output_start : self.output_start + length]
        told = None if self.sampling.logprobs is None else tuple(self.logprobs[:length])
        return Completion(
            self.request.id,
            self.output_start,
            tuple(output),
            ending.finish_reason,
            ending.stop_reason,
            self.counts,
            ending.error,
            ending.error_class,
            seconds=ended - self.admitted,
            calibration=self.memory.calibration(),
            trace=tuple(self.trace),
            logprobs=told,
            prompt_logprobs=self.prompt_logprobs,
        )


class Scheduler:
    """Admits waiting rows to slots as slots and memory allow, in order.

    All caches have one shape, slots x capacity, with at most `max_positions` positions; it is
    changed when the row at the head of the queue does not fit, so long rows trade slots for length.

    Args:
        shared: the caches of target and drafter.
        slots: most rows in flight.
        max_positions: most cache positions over all slots.
    """

    def __init__(self, shared: SharedCaches, slots: int, max_positions: int) -> None:
        self.shared, self.slots, self.max_positions = shared, slots, max_positions
        self.queue: deque[LiveRow] = deque()
        self._rows: list[LiveRow | None] = []  # by slot; None is a hole left by a retired row

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
            self.shared.place(row, hole)
        self._compact()
        return self.rows

    def retire(self, slot: int) -> None:
        """Free a slot. What it holds stays there for others to share until it is overwritten."""
        self._rows[slot] = None

    def _reserve(self, need: int) -> bool:
        """Whether one more row of `need` positions fits; reshape the caches if that helps."""
        live, shape = self.live, self.shared.caches[0]
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
                self.shared.resize(slots, capacity)
                return True
        return False

    def _compact(self) -> None:
        """Fill each hole with the last row, so that attention sees a rectangle without gaps."""
        for hole in reversed([slot for slot, row in enumerate(self._rows) if row is None]):
            last = self._rows.pop()
            if hole < len(self._rows):
                self._rows[hole] = last
                self.shared.move(len(self._rows), hole)
