"""Draws the candidates of a round, one more of all rows at a time, until the policy has had enough.

A GPU waits while the host decides. So draft steps *run ahead*: they are launched before it is known
that they are wanted. Where rows drafted in the last round, those of the next one begin before rows
retire, others are admitted and the policy is asked. Where a policy looks at candidates and another
step mostly follows, that one is launched before it has answered.

That changes no decision. Rows that turn out to have had enough drop candidates at which nobody has
looked.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from specdec.drafters.base import Candidates, Drafter, Drafting
from specdec.engine.round import Round
from specdec.engine.scheduler import LiveRow
from specdec.engine.seen import later, on_host
from specdec.engine.stats import EngineStats
from specdec.engine.tree_loop import TreeLoop
from specdec.measure.clock import PhaseClock
from specdec.model.rows import upload
from specdec.model.sharing import SharedCaches
from specdec.policies.base import DraftStep, Signal, StopPolicy

LIKELY = 0.75
"""How often another step must have followed lately for the next one to run ahead.

A step in vain takes the device its time. One that waits leaves the device idle while the host
decides and launches. Raised, fewer steps are in vain, and the device waits more often.
"""

MEMORY = 0.9
"""Weight that is left of what followed a step after one more round. Raised, changes count later."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A draft step that was launched: candidates of the rows in `slots`, int64 [n] in `index`."""

    slots: list[int]
    index: Tensor
    candidates: Candidates

    def rows(self, kept: Sequence[int]) -> tuple[list[int], Tensor]:
        """Slots and index of some of its rows: indices into them."""
        if len(kept) == len(self.slots):
            return self.slots, self.index
        slots = [self.slots[i] for i in kept]
        return slots, upload(self.index.device, slots)[0]

    def of(self, kept: Sequence[int]) -> _Step:
        """The same of some of its rows."""
        if len(kept) == len(self.slots):
            return self
        (at,) = upload(self.index.device, kept)
        return _Step(*self.rows(kept), self.candidates.of(at))


@dataclass(slots=True)
class _Launched:
    """Steps that nobody has asked for yet, and what goes on behind the last of them.

    Attributes:
        of: the round whose rows and slots they are of.
        wanted: signals that they tell.
        drafting: draws.
        read: how many positions of each slot the draft had read before them.
        steps: of all rows at first, of those with room for them behind that.
    """

    of: Round
    wanted: frozenset[Signal]
    drafting: Drafting
    read: Sequence[int]
    steps: deque[_Step] = field(default_factory=deque)

    @property
    def before(self) -> dict[int, int]:
        """`read` of the rows that they are of, by the rows' ids: rows may move meanwhile."""
        slots = self.steps[0].slots if self.steps else ()
        return {id(self.of.rows[slot]): self.read[slot] for slot in slots}

    def begins(self, this: Round, active: Iterable[int]) -> bool:
        """Whether a round in which some slots draft begins with these steps."""
        first, rows = set(self.steps[0].slots), self.of.rows
        return self.of.mode is this.mode and all(
            slot in first and rows[slot] is this.rows[slot] and not this.known[slot]
            for slot in active
        )

    def take_back(
        self, rows: Sequence[LiveRow], shared: SharedCaches, but: Collection[int] = ()
    ) -> None:
        """Let the draft forget what it has read of candidates.

        Args:
            rows: the live rows, by slot; some may have moved there since.
            shared: all caches.
            but: slots that go on with the steps.
        """
        began, going = self.before, {*but}
        for slot, row in enumerate(rows):
            if id(row) in began and slot not in going:
                # What it has read is what its next first step must read.
                shared.rollback(slot, len(row.tokens) - 1)

    def next(self, active: Sequence[int]) -> _Step:
        """The next of these steps, of some of its rows; behind the last one, drafting is theirs."""
        step = self.steps.popleft()
        places = [*map(step.slots.index, active)]
        if not self.steps:
            self.drafting.go_on(places)
        return step.of(places)


class DraftLoop:
    """Asks a drafter for candidates, and a policy for which rows it shall go on.

    Args:
        drafter: proposes.
        policy: decides.
        clock: times it, and knows whether the device works beside the host.
        stats: counts forwards.
    """

    def __init__(
        self, drafter: Drafter, policy: StopPolicy, clock: PhaseClock, stats: EngineStats
    ) -> None:
        self._drafter, self._policy, self._clock, self._stats = drafter, policy, clock, stats
        self._trees = TreeLoop(drafter, policy, clock, stats)
        self._followed = defaultdict[int, float](float)  # by depth: how often another step did
        self._last: tuple[list[LiveRow], list[int]] = [], []  # rows of the last round, and active
        self._ahead: _Launched | None = None

    def run(self, this: Round, shared: SharedCaches) -> None:
        """Add as many candidates to the round's proposal as the policy wants.

        Args:
            this: the round.
            shared: all caches.
        """
        began = self._clock.now()
        known = this.proposal.known
        wanted = zip(self._policy.budget(this.start), this.start.room, known, strict=True)
        behind = this.start.draws_behind
        budget = [min(k, room - n) if behind or not n else 0 for k, room, n in wanted]
        if self._policy.branches and this.start.nodes and not any(known):
            self.drop_ahead(this.rows, shared)
            self._last = [], []
            self._trees.run(this, shared, budget)
            return
        active = [slot for slot, most in enumerate(budget) if most > 0]
        self._last = this.rows, active
        if not active:
            self.drop_ahead(this.rows, shared)
            return
        device = self._drafter.cache.device
        longest = max(k + n for k, n in zip(budget, known, strict=True))
        proposal = this.proposal = this.begun(longest)
        unseen: list[tuple[DraftStep, Tensor]] = []
        asked, launched = 0.0, self._ahead
        if launched and launched.wanted == self._wanted and launched.begins(this, active):
            self._ahead, index = None, launched.steps[0].index
            launched.take_back(this.rows, shared, but=active)
            asked = this.timer.since(began)  # a device has drawn meanwhile
        else:
            self.drop_ahead(this.rows, shared)
            drafting = self._drafter.begin(this.rows, active, this.known, shared)
            launched = _Launched(this, self._wanted, drafting, ())
            (index,) = upload(device, active)
        for depth in range(1, max(budget) + 1):
            with this.timer.apart() as lap:
                if launched.steps:
                    step = launched.next(active)
                else:
                    step = self._launch(this, launched.drafting, active, index, depth)
                drawn = step.candidates
                this.add(active, step.index, drawn)
                if drawn.signals is not None and not self._policy.looks:
                    # A copy: later steps of this size overwrite what was recorded.
                    blind = DraftStep(np.array(step.slots), depth, np.zeros((0, len(Signal))))
                    unseen.append((blind, drawn.signals.clone()))
                within = [i for i, slot in enumerate(active) if budget[slot] > depth]
                going = self._going(this, launched, step, depth, within)
            this.draft_costs.append((sum(drawn.fed), lap.seconds + asked))
            asked = 0.0
            if not going:
                break
            active, index = step.rows(going)
        if unseen:
            this.unseen = later(self._clock, unseen)
        this.submitted = self._policy.submit(proposal.lengths)

    def go_ahead(
        self, last: Round, rooms: Sequence[int], number: int | None, shared: SharedCaches
    ) -> None:
        """Launch the steps that the next round will probably want, before it begins.

        Args:
            last: the round before it, which is committed.
            rooms: how many candidates each of its rows may have; 0: it is gone or does not decode.
            number: of the next round (`Round`).
            shared: all caches.
        """
        rows, active = self._last
        if rows is not last.rows or not active or any(last.known) or last.asked.of_logits:
            return
        declined = {slot for slot, room in enumerate(last.start.room) if room}.difference(active)
        slots = [slot for slot, room in enumerate(rooms) if room and slot not in declined]
        if not slots:
            return
        read = [*self._drafter.cache.lengths]
        drafting = self._drafter.begin(rows, slots, [()] * len(rows), shared)
        (index,) = upload(self._drafter.cache.device, slots)
        self._ahead = ahead = _Launched(last, self._wanted, drafting, read)
        this = last.behind(number)
        # As many as each row has drafted that had room for more.
        before = zip(last.drafted, last.start.room, strict=True)
        most = min((n for n, room in before if 0 < n < room), default=max(last.drafted))
        for depth in range(1, most + 1):
            step = self._launch(this, drafting, slots, index, depth)
            ahead.steps.append(replace(step, candidates=step.candidates.kept()))
            going = [i for i, slot in enumerate(slots) if rooms[slot] > depth]
            if self._policy.looks or depth == most or not going:
                break
            drafting.go_on(going)
            slots, index = step.rows(going)

    def drop_ahead(self, rows: Sequence[LiveRow], shared: SharedCaches) -> None:
        """Take back the steps that ran ahead, if there are any; `rows` are the live ones."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.take_back(rows, shared)

    def pending(self, rows: Sequence[LiveRow]) -> list[int]:
        """Tokens of the live rows, by slot, that the draft must read, steps ahead left out."""
        pending, read = self._drafter.pending, self._drafter.cache.lengths
        if self._ahead is None:
            return [*map(pending, rows, read)]
        before = self._ahead.before
        return [pending(row, before.get(id(row), read[slot])) for slot, row in enumerate(rows)]

    @property
    def _wanted(self) -> frozenset[Signal]:
        return frozenset(self._policy.wanted)

    def _launch(
        self, this: Round, drafting: Drafting, slots: list[int], index: Tensor, depth: int
    ) -> _Step:
        """Queue the step that draws candidate number `depth` of some rows."""
        candidates = drafting.step(this.choosing(slots, index, depth, self._policy))
        self._stats.count_draft(candidates.fed)
        return _Step(slots, index, candidates)

    def _going(
        self, this: Round, launched: _Launched, last: _Step, depth: int, within: list[int]
    ) -> list[int]:
        """Which rows go on behind a step, as the policy says if it looks.

        Args:
            launched: what is behind that step; one more may be, afterwards.
            last: the step, of the rows that still draft.
            depth: how many candidates they have with it.
            within: those of them that may have more: indices.
        """
        going, drafting = within, launched.drafting
        if last.candidates.signals is not None and self._policy.looks:
            signals = self._clock.fetch(last.candidates.signals)
            likely = self._clock.asynchronous and self._followed[depth] >= LIKELY
            if within and likely and not launched.steps:
                drafting.go_on(within)
                further = self._launch(this, drafting, *last.rows(within), depth + 1)
                launched.steps.append(further)
            with self._clock.phase({"decide": 1.0}):
                host = on_host(signals())
                flags = self._policy.go_on(DraftStep(np.array(last.slots), depth, host))
            going = [i for i in within if flags[i]]
            if within:
                followed = MEMORY * self._followed[depth] + (1 - MEMORY) * bool(going)
                self._followed[depth] = followed
        if not launched.steps:
            drafting.go_on(going)
        elif not going:
            drafting.go_on([])
        return going
