"""The policy `goodput`: SpecDec++'s stopping problem for a batch, under measured costs.

With a live batch, one row that stops early saves no draft step; what it saves is tokens of the
verification, and what everything costs depends on the batch. So `goodput` asks of each step what it
is expected to bring and what it costs (specdec/policies/objective.py), for all rows together:

    choose   which of the candidates that are known without a draft to take? (lookups.py)
    budget   is speculation worth it at all, and for which rows? as chains or as trees?
    go_on    which rows draft another candidate?
    submit   which candidates are worth verifying?
    observe  learn: acceptance (Estimator), costs (CostModel), the goodput reached, the switch

Three things go beyond one round. Whether to speculate at all is a `Switch`, which holds speculation
to its promises (specdec/policies/switch.py). What the draft must read of a row before it can
propose is a debt that the row's rounds share (specdec/policies/catch_up.py). And beside a device
that is faster than the host's decisions, as many candidates as pay on average may be better than
the best choice that the device has to wait for.

What each kind of round would draft is an offer (specdec/policies/offers.py). The same for trees is
in specdec/policies/growing.py. Whether these are faster than chains is
measured for each size of batch, as is whether to look (specdec/policies/kinds.py).

What may be trimmed. In matching modes any candidate may be dropped, so the verified set is chosen
when all are drawn. Under rejection sampling y_k may be dropped by what was known before it was
drawn: after the draft step that made its distribution, by the estimate that does not know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from specdec.measure.calibration import Flags
from specdec.policies.base import MOST_CANDIDATES, MOST_WIDTH, DraftStep, RoundOutcome, RoundStart
from specdec.policies.catch_up import shared
from specdec.policies.costs import CostModel
from specdec.policies.kinds import Kind
from specdec.policies.lookups import LookingUpPolicy
from specdec.policies.measuring import LearntCosts, PromptTokens
from specdec.policies.objective import best_constant, by_row
from specdec.policies.offers import MEMORY, Offer
from specdec.policies.settings import setting
from specdec.policies.switch import IN_A_ROW, Switch

if TYPE_CHECKING:
    from specdec.model.decoder import PackedDecoder

PAUSE = 20.0
"""Most that a round counts for, in rounds without speculation.

What is longer is a pause of the machine, not what speculation costs. Set by hand.
"""

FIRST_ROWS = 16
"""Rows that draft before any candidate was judged.

Raised, a useless draft reads more prompts before it is found out; lowered, a good one starts later.
"""

LEARNT = 250
"""Judged candidates before promises are held against what rounds yield.

A promise that was made on a first guess of the acceptance rate is no longer made when that is
known. Raised, what promises really leave out is seen later.
"""


@dataclass(eq=False)
class Goodput(LookingUpPolicy):
    """Maximises committed tokens per second; K = 0 where speculation does not pay.

    Attributes:
        costs: D(n) and V(n); by default profiled before the first round.
        price: tokens that a second of the round is worth.
    """

    name = "goodput"
    summary = "drafts and verifies what brings more tokens per second than it costs"
    looks_up = True

    costs: CostModel | None = None
    k_max: int = setting(20, 1, MOST_CANDIDATES, "most candidates of a round")
    width: int = setting(3, 1, MOST_WIDTH, "most children of a node, where trees are faster")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.switch = Switch()
        self._prompts = PromptTokens()
        self._begun: RoundStart | None = None
        # Tokens per row lately, and what the best constant length would have made of the time.
        self.price, self._constant = 0.0, 0.0
        # `best_constant` with the cost tables as they are: by whether these look, rows and rate.
        self._constants: dict[tuple[bool, int, float], float] = {}
        self._tokens, self._hoped = 5.0, 5.0

    def prepare(self, target: PackedDecoder, draft: PackedDecoder | None, slots: int) -> None:
        if draft is None:
            self._looking_up, self.switch = True, self.found_switch
        if self.costs is None:
            from specdec.policies.profiling import profile_costs  # torch: policies load without

            self.costs = profile_costs(target, draft, slots)
            self._learnt = LearntCosts(self.costs)

    def costs_table(self) -> dict[str, list[tuple[int, float]]]:
        tables = self.costs.points() if self.costs is not None else {}
        if self._looking_up:
            tables.pop("draft", None)
        return tables

    # ---------------------------------------------------------------- before drafting

    def budget(self, start: RoundStart) -> Sequence[int]:
        assert self.costs is not None, "prepare() comes before the first round"
        budget = [0] * len(start.rows)
        self._probing, self._looks = False, True
        self._plant(None)
        known = [*map(len, self._known)] if self._begun is start else budget
        behind, rooms = start.draws_behind, enumerate(zip(start.room, known, strict=True))
        rows = [row for row, (room, n) in rooms if room > n and (behind or not n)]
        if not rows or self.switch.stands(start):
            self._steps = []
            return budget
        if self._begun is not start:
            self._begin(start)
        possible = self._possible(start, any(known))
        best = self.kinds.choose(len(start.rows), possible)
        # Where rounds of one kind do not pay, those may that take the host less, or choose more.
        others = [each for each in possible if each == best._replace(looks=not best.looks)]
        offers = dict[Kind, Offer]()
        for kind in (best, *others):
            offer = offers[kind] = self._offer(start, rows, known, kind)
            if self.switch.pays(offer.promised / len(rows)):
                chosen, hope = offer.rows, offer.promised / len(rows)
                if self._judged <= self.PAIR_WEIGHT:  # nothing is known of the pair yet
                    chosen = chosen[:FIRST_ROWS]
                if kind.branches:
                    self._plant(start, kind.looks)
                break
        else:
            if self._all_pay:  # if it were not for what was looked up: that is no reason to rest
                self._steps = []
                return budget
            self._probing, hope, kind = True, None, Kind()
            offer = offers.get(kind) or self._offer(start, rows, known, kind)
            self._use(kind.looks)
            saved_up = not self._may_pay(offer)
            chosen = self.switch.probe(start, sorted(rows), self.costs, saved_up=saved_up)
        alike = [each for each in possible if each.looks == kind.looks]
        usual = kind == self.kinds.fastest(len(start.rows), alike)
        start.notes.update(promised=hope, kind=kind, usual=usual)
        for row in chosen:
            budget[row] = self.k_max if kind.looks else offer.length
            start.rows[row].catch_up = offer.debts[row]
        return budget

    def _begin(self, start: RoundStart) -> None:
        super()._begin(start)
        assert self.costs is not None
        self._begun, self._known = start, [[] for _ in start.rows]
        assert self._learnt is not None
        if start.beside:
            self._learnt.tell_apart()
        if self._learnt.at(len(start.rows), sum(start.contexts) / len(start.rows)):
            self._forget_costs()
        self._free_trimming = start.free_trimming
        self._kept = [0] * len(start.rows)
        self._tokens_bare = self._tokens_fed = self._prompts.places(start, start.target_tokens)
        # What a second is worth: what the best constant length would make of it, corrected by how
        # that compared with what was reached lately. So a change of rows or costs counts at once.
        rows, rate = len(start.rows), sum(self.typical) / len(self.typical)
        plain = self._constant = rows / float(self.costs.verify(rows))
        if not self._looking_up:
            key = self.looks, rows, round(rate, 2)
            if key not in self._constants:
                self._constants[key] = best_constant(self.costs, *key[1:], self.k_max)
            self._constant = self._constants[key]
        self.price = max(plain, self._constant * self._tokens / self._hoped)
        # Tokens that a draft brings a row of a round, in the time of one without.
        worth = self._constant / plain - 1 - self.switch.missing
        self._worth = max(worth, 0.0) if self.switch.on else 0.0

    # ----------------------------------------------------------- after each candidate

    def go_on(self, step: DraftStep) -> Flags:
        assert self.costs is not None
        if step.parents is not None:
            return self._expand(step)
        alive = [] if self._free_trimming else [*self.survival]
        judged = self._judge(step)
        rows = judged.rows
        left, kept = self.k_max - step.depth, rows
        if not self._free_trimming:
            if not (self._probing and step.depth == 1):
                each = zip(rows, judged.before, strict=True)
                reached = {row: alive[row] * before for row, before in each}
                kept = self._best(reached, [0.0] * len(kept), left + 1)
            for row in kept:
                self._kept[row] = len(self._known[row]) + step.depth
        self._tokens_fed += len(kept)
        going = set[int]()
        if left and kept:
            expected = {row: self.survival[row] * self.typical[row] for row in kept}
            next_step = self.costs.draft.curve(1, len(kept)).tolist()
            going = set(self._best(expected, next_step, left))
        return np.array([row in going for row in rows])

    def _best(self, expected: dict[int, float], first: Sequence[float], left: int) -> list[int]:
        """Which rows to take one step further, by what that is expected to yield of each."""
        rows = sorted(expected, key=lambda row: -expected[row])
        rates = [self.typical[row] for row in rows]
        n, _, gain = self._leading(rates, [expected[row] for row in rows], first, left)
        return rows[:n] if gain > 0 else []

    # ------------------------------------------------------------ before verification

    def submit(self, drafted: Sequence[int]) -> Sequence[int]:
        if not self._looks:
            return drafted
        # Where it may be trimmed freely, the set is chosen now that all are drawn.
        free = self._free_trimming
        counts = by_row(self._best_set()[0], len(drafted)) if free else self._kept
        self._note_trimming(counts, [*map(len, self._known)])
        return drafted if free and self._probing else counts

    # ---------------------------------------------------------------- after the round

    def observe(self, outcome: RoundOutcome) -> None:
        super().observe(outcome)
        self.found.observe(outcome)
        if self.costs is None or self._learnt is None:
            return
        start, speculated = outcome.start, bool(outcome.draft_costs)
        promised, found = map(start.notes.get, ("promised", "found"))
        switch, hope, known, apart = self.switch, promised, self._judged, found or 0.0
        if not speculated:
            switch, hope, known, apart = self.found_switch, found, self.found.judged, 0.0
        if hope is not None and known > LEARNT:
            switch.kept(hope, self._yield(outcome) - apart, len(start.rows))
        self._prompts.observe(outcome, self.costs.verify)
        if start.prompt_tokens:
            self._furthers = {}  # sizes with a prompt in them hardly come again, and would pile up
        if not start.decodes:
            return
        rows, (tokens, spent) = len(start.rows), outcome.verify_cost
        spent += sum(spent for _, spent in outcome.draft_costs)
        others = tokens - start.prompt_tokens
        spent -= float(self.costs.verify(self._prompts.places(start, tokens)))
        spent += float(self.costs.verify(others))
        told = speculated and promised is not None
        kind, beside = start.notes.get("kind", Kind()), told and start.beside
        if beside or (told and start.nodes and self.grows):
            self._compare(outcome, kind, spent)
        if not beside or start.notes["usual"]:  # others have other costs than most
            self._learnt.note(outcome, kind.looks)
        self._tokens = MEMORY * self._tokens + sum(outcome.accepted) / rows + 1
        plain = float(self.costs.verify(rows))
        spent = min(spent, PAUSE * plain)
        self._hoped = MEMORY * self._hoped + self._constant * spent / rows
        switches = {self.switch: speculated, self.found_switch: any(outcome.submitted)}
        for each, used in switches.items():
            each.ended(used, spent / plain)
        if self._learnt.teach():
            self._forget_costs()

    def _forget_costs(self) -> None:
        """Leave nothing that was reckoned with costs as they were."""
        self._furthers, self._constants = {}, {}

    def _yield(self, outcome: RoundOutcome) -> float:
        """Tokens per row that a round with candidates yielded beyond its cost."""
        assert self.costs is not None
        start, verify = outcome.start, self.costs.verify
        tokens, seconds = outcome.verify_cost
        if not start.decodes:  # then most of it is prefill
            seconds = float(verify(self._prompts.places(start, tokens)))
        if outcome.draft_costs:
            seconds += sum(spent for _, spent in outcome.draft_costs)
            seconds = shared(seconds, outcome, self.costs.draft)
        extra = seconds - float(verify(self._prompts.places(start, start.target_tokens)))
        gain = sum(outcome.accepted) - self.price * extra
        return gain / sum(room > 0 for room in start.room)

    def _reason(self, row: int, drafted: int) -> str:
        if self.switch.look_again and not self._steps:
            return f"{IN_A_ROW} rounds had candidates; what one without them costs is to be seen"
        if not drafted:
            return f"no candidate repays its cost at {self.price:.0f} tokens/s"
        return (
            f"after {drafted}: another is reached with probability {self.survival[row]:.2f}, "
            f"at {self.price:.0f} tokens/s too little for its cost"
        )
