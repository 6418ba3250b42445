"""Who is in flight: the queue, and the rows in slots."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from specdec.engine.ending import Ending, StopSearch
from specdec.lossless.grammars import RowGrammar
from specdec.model.pages import PAGE, pages_of
from specdec.model.sharing import OWN, SharedCaches
from specdec.policies.memory import RowMemory
from specdec.request import Completion, Counts, Request, RoundTrace, SamplingParams, TokenLogprob

MOST_PREEMPTIONS = 2
"""A row that was sent back so often is admitted with all pages that it may need.

Raised, more tokens may be computed again; lowered, rows reserve pages that they leave empty.
"""

GROWTH = 0.1
"""How much of a mean output a live row is expected to need pages for, more than it has.

Rows end one after the other, so that the pages of those that end serve those that grow. Raised,
fewer rows are in flight; lowered, more are sent back. Prompts of 20 to 800 tokens with outputs of
20 to 300: at 0.5 2.7 times the rows of a rectangle, at 0.1 3.1 times with 2% of the tokens computed
twice, at 0 as many with 6%.
"""

REMEMBERED = 100
"""Outputs that a mean length is taken of; later ones count more.

Raised, the mean is steadier, and follows a job whose outputs change more slowly.
"""


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
        doubtful: whether its last round failed with candidates; the next one has none. Or whether
            among others states of its prompt, or its given completion's score, were not finite.
        trace: its rounds, if they are kept.
        admitted: when it first got a slot, by `time.perf_counter`.
        turn: the number of its admission, the last one if it was sent back.
        room: positions that its pages hold.
        preempted: how often it lost its slot for want of pages.
        grammar: what its output is, if it asks for that; made when it gets a slot.
        logprobs: of its output tokens, if it asks for them; of those that are given.
        prompt_logprobs: of its prompt's, if it asks for them; read when it gets a slot.
        adjusts: whether it asks for anything of its logits.
        own: a number that samples of one prompt share.
        read: how many of its tokens the suffix index has read.
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
    turn: int = 0
    room: int = 0
    preempted: int = 0
    grammar: RowGrammar | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    adjusts: bool = field(init=False)
    own: int = field(init=False)
    read: int = 0

    def __post_init__(self) -> None:
        self.adjusts, self.own = self.sampling.adjusts, hash(self.request.prompt_ids)

    @property
    def generated(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.output_start

    @property
    def need(self) -> int:
        """Cache positions that the row can need until it ends."""
        return self.output_start + self.sampling.max_new_tokens

    @property
    def sharable(self) -> int:
        """How many of its first tokens it may share with others: none that it tells something of.

        What a prompt's log-probabilities or a given completion are told by is the row's own. What
        others have left may be what is not finite.
        """
        if self.doubtful:
            return 0
        if self.sampling.prompt_logprobs is not None and self.prompt_logprobs is None:
            return 0
        if self.request.given_ids:
            return self.output_start - 1
        return len(self.tokens) - OWN

    def completed(self, ending: Ending, ended: float) -> Completion:
        """What became of the request; it ended at `ended`, by `time.perf_counter`."""
        length = 0 if ending.error is not None else ending.length
        output = self.tokens[self.output_start : self.output_start + length]
        kept = len(self.request.given_ids) if ending.error is None else 0
        kept = kept or length
        told = None if self.sampling.logprobs is None else tuple(self.logprobs[:kept])
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


class OutputLengths:
    """How long outputs are, from those that ended and those that have not yet.

    The mean is of tokens for each end. Tokens of live rows count, too: the first outputs to end are
    the shortest, and would make all seem short.
    """

    def __init__(self) -> None:
        self._ended = self._tokens = 0.0

    def add(self, tokens: int) -> None:
        """Count an output that ended."""
        keep = 1 - 1 / REMEMBERED
        self._ended, self._tokens = keep * self._ended + 1, keep * self._tokens + tokens

    def mean(self, going: int, first: int) -> float:
        """Tokens of an output.

        Args:
            going: output tokens of live rows so far.
            first: the length of one that is made up to begin with.
        """
        return (self._tokens + going + first) / (self._ended + 1)


class Scheduler:
    """Admits waiting rows in order, as slots and pages allow; sends rows back where pages run out.

    Before each round every row has pages for its tokens and what the round may add. A row gets a
    slot if it and the live rows are expected to find pages until they end. Where they do not, the
    row admitted last gives its pages back, waits at the head of the queue, and its tokens are
    computed again. So the first admitted always goes on, and a row that was sent back
    `MOST_PREEMPTIONS` times gets all pages that it may need at once.

    Args:
        shared: the caches of target and drafter.
        slots: most rows in flight.
        pages: most pages of each cache.
        context: most tokens of a row.
        ahead: most candidates of a row in a round.

    Attributes:
        preempted: how often a row was sent back.
    """

    def __init__(
        self, shared: SharedCaches, slots: int, pages: int, context: int, ahead: int
    ) -> None:
        self.shared, self.slots, self.pages, self.ahead = shared, slots, pages, ahead
        self.queue: deque[LiveRow] = deque()
        self.preempted = 0
        self._rows: list[LiveRow | None] = []  # by slot; None is a hole left by a row
        self._turns, self._short = 0, False  # whether a row was sent back since rows were admitted
        self._lengths = OutputLengths()
        self._going = 0  # output tokens of live rows, while rows are admitted
        shared.grow(slots, min(context, pages * PAGE), 0)

    @property
    def live(self) -> int:
        """Rows in slots."""
        return len(self._rows) - self._rows.count(None)

    @property
    def seats(self) -> Sequence[LiveRow | None]:
        """The rows by slot; None: it left, and no other has the slot yet."""
        return self._rows

    @property
    def rows(self) -> list[LiveRow]:
        """The rows in slots, in the order of slots."""
        return [row for row in self._rows if row is not None]

    def admit(self) -> list[LiveRow]:
        """Give pages to live rows and slots to waiting ones; return the rows of slots 0..n-1."""
        self.secure()
        if self.queue and self.live < self.slots:
            self._going = sum(row.generated for row in self.rows)
        while self.queue and not self._short and self._place(self.queue[0]):
            self.queue.popleft()
        self._short = False
        self.compact()
        return self.rows

    def retire(self, slot: int) -> None:
        """Free a slot. What it holds stays for others to share until its pages are needed."""
        row = self._rows[slot]
        assert row is not None, "the slot has a row"
        self._lengths.add(row.generated)
        self._leave(slot)

    def _leave(self, slot: int) -> None:
        row, self._rows[slot] = self._rows[slot], None
        if row is not None and row.doubtful:  # others must not find what may not be finite
            self.shared.scrub(slot, 0)
            self.shared.rollback(slot, 0)
        self.shared.release(slot)

    def _goal(self, row: LiveRow) -> int:
        """Positions that a row may fill in a round, or until it ends if it was sent back often."""
        if row.preempted >= MOST_PREEMPTIONS:
            return row.need
        return min(len(row.tokens) + self.ahead + 1, row.need)

    def secure(self) -> None:
        """Give every live row pages for a round; where there are too few, the oldest go on."""
        lacking = [row for row in self.rows if len(row.tokens) + self.ahead >= row.room < row.need]
        for row in sorted(lacking, key=lambda row: row.turn):
            while row in self._rows:
                if self.shared.extend(self._rows.index(row), self._goal(row)):
                    row.room = pages_of(self._goal(row)) * PAGE
                    break
                if not self._grow():
                    self._preempt()

    def _grow(self) -> bool:
        """Make the caches larger, if they may be; it takes long, so it happens seldom."""
        now = self.shared.pages
        longest = max(row.need for row in [*self.rows, *islice(self.queue, self.slots)])
        pages = min(self.pages, max(2 * now, self.slots * pages_of(longest)))
        self.shared.grow(self.slots, 0, pages)
        return pages > now

    def _preempt(self) -> None:
        """Send back the row that was admitted last, but none that has all pages it may need."""
        rows = [row for row in self.rows if row.preempted < MOST_PREEMPTIONS]
        last = max(rows, key=lambda row: row.turn)
        last.preempted += 1
        self.preempted += 1
        self._short = True
        self._leave(self._rows.index(last))
        self.queue.appendleft(last)

    def _place(self, row: LiveRow) -> bool:
        """Give a waiting row a slot, if there is one and all are expected to find pages."""
        if self.live == self.slots or not self._expected_to_fit(row):
            return False
        slot = self._rows.index(None) if None in self._rows else len(self._rows)
        while not self.shared.place(row, slot, self._goal(row)):
            if not self._grow():
                return False
        self._turns += 1
        row.turn, row.admitted = self._turns, row.admitted or time.perf_counter()
        row.room = pages_of(self._goal(row)) * PAGE
        self._rows[slot : slot + 1] = [row]
        self._going += row.generated
        return True

    def _expected_to_fit(self, row: LiveRow) -> bool:
        """Whether the pages there are will do for a row and the live ones, as far as one knows."""
        if not self.live:
            return True
        spare = self.pages - self.shared.pages + self.shared.available
        spare -= self.shared.fresh(row, self._goal(row))
        growth = GROWTH * self._lengths.mean(self._going, row.sampling.max_new_tokens)
        # Where there is room for all to grow that much, none of them has to be looked at.
        if growth * (self.live + 1) / PAGE <= spare:
            return True
        more = sum(min(growth, each.need - self._goal(each)) for each in (*self.rows, row))
        return more / PAGE <= spare

    def compact(self) -> None:
        """Fill each hole with the last row, so that attention sees slots without gaps."""
        for hole in reversed([slot for slot, row in enumerate(self._rows) if row is None]):
            last = self._rows.pop()
            if hole < len(self._rows):
                self._rows[hole] = last
                self.shared.move(len(self._rows), hole)
