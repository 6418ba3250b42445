"""Draws the candidates of a round, one more of all rows at a time, until the policy has had enough.

A policy that looks at candidates makes the host wait for each of them, and a GPU then waits for the
host. So where another draft step mostly follows, it is launched before the policy has answered: it
*runs ahead*. So does the first one, where the rows are those of the last round. That changes no
decision. Rows that turn out to have had enough drop its candidate, at which nobody has looked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

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

    def run(self, this: Round, shared: SharedCaches) -> None:
        """Add as many candidates to the round's proposal as the policy wants.

        Args:
            this: the round.
            shared: all caches.
        """
        began = self._clock.now()
        early = self._early(this, shared)
        known = this.proposal.known
        wanted = zip(self._policy.budget(this.start), this.start.room, known, strict=True)
        behind = this.start.draws_behind
        budget = [min(k, room - n) if behind or not n else 0 for k, room, n in wanted]
        if self._policy.branches and this.start.nodes and not any(known):
            self._abandon(this, shared, early)
            self._last = [], []
            self._trees.run(this, shared, budget)
            return
        active = [slot for slot, most in enumerate(budget) if most > 0]
        self._last = this.rows, active
        if not active:
            return
        device = self._drafter.cache.device
        longest = max(k + n for k, n in zip(budget, known, strict=True))
        proposal = this.proposal = this.begun(longest)
        asked, step = 0.0, None
        unseen: list[tuple[DraftStep, Tensor]] = []
        if early is not None and set(active) <= set(early[1].slots):
            drafting, first = early
            places = [*map(first.slots.index, active)]
            drafting.go_on(places)
            step = first.of(places)
            index, asked = step.index, this.timer.since(began)
        else:
            self._abandon(this, shared, early)
            drafting = self._drafter.begin(this.rows, active, this.known, shared)
            (index,) = upload(device, active)
        for depth in range(1, max(budget) + 1):
            with this.timer.apart() as lap:
                step = step or self._launch(this, drafting, active, index, depth)
                drawn = step.candidates
                this.add(active, step.index, drawn)
                if drawn.signals is not None and not self._policy.looks:
                    # A copy: later steps of this size overwrite what was recorded.
                    blind = DraftStep(np.array(step.slots), depth, np.zeros((0, len(Signal))))
                    unseen.append((blind, drawn.signals.clone()))
                within = [i for i, slot in enumerate(active) if budget[slot] > depth]
                last, (step, going) = step, self._next(this, drafting, step, depth, within)
            this.draft_costs.append((sum(drawn.fed), lap.seconds + asked))
            asked = 0.0
            if not going:
                break
            active, index = last.rows(going)
        if unseen:
            this.unseen = later(self._clock, unseen)
        this.submitted = self._policy.submit(proposal.lengths)

    def _early(self, this: Round, shared: SharedCaches) -> tuple[Drafting, _Step] | None:
        """The first step of the rows that drafted in the last round, if these are all still there.

        A device works on it while the policy makes up its mind.
        """
        rows, slots = self._last
        ready = this.rows == rows and all(this.start.room[slot] for slot in slots)
        ready = ready and not any(this.known[slot] for slot in slots)  # most would go on elsewhere
        if not (self._clock.asynchronous and slots and ready):
            return None
        drafting = self._drafter.begin(this.rows, slots, this.known, shared)
        (index,) = upload(self._drafter.cache.device, slots)
        return drafting, self._launch(this, drafting, slots, index, 1)

    def _abandon(
        self, this: Round, shared: SharedCaches, early: tuple[Drafting, _Step] | None
    ) -> None:
        """Take an early step back: it has read what its rows' next first step must read."""
        for slot in early[1].slots if early is not None else ():
            shared.rollback(slot, len(this.rows[slot].tokens) - 1)

    def _launch(
        self, this: Round, drafting: Drafting, slots: list[int], index: Tensor, depth: int
    ) -> _Step:
        """Queue the step that draws candidate number `depth` of some rows."""
        candidates = drafting.step(this.choosing(slots, index, depth, self._policy))
        self._stats.count_draft(candidates.fed)
        return _Step(slots, index, candidates)

    def _next(
        self, this: Round, drafting: Drafting, last: _Step, depth: int, within: list[int]
    ) -> tuple[_Step | None, list[int]]:
        """Which rows go on behind a step, and the next step if it is launched already.

        Args:
            last: the step, of the rows that still draft.
            depth: how many candidates they have with it.
            within: those of them that may have more: indices.
        """
        if last.candidates.signals is None or not self._policy.looks:
            drafting.go_on(within)
            return None, within
        signals = self._clock.fetch(last.candidates.signals)
        ahead = None
        if within and self._clock.asynchronous and self._followed[depth] >= LIKELY:
            drafting.go_on(within)
            ahead = self._launch(this, drafting, *last.rows(within), depth + 1)
        with self._clock.phase({"decide": 1.0}):
            host = on_host(signals())
            flags = self._policy.go_on(DraftStep(np.array(last.slots), depth, host))
        going = [i for i in within if flags[i]]
        if within:
            followed = MEMORY * self._followed[depth] + (1 - MEMORY) * bool(going)
            self._followed[depth] = followed
        if ahead is None or not going:
            drafting.go_on(going)
            return None, going
        kept = [i for i, each in enumerate(within) if flags[each]]
        drafting.go_on(kept)
        return ahead.of(kept), going
