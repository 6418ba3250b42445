"""What a round would draft, by its kind, and what that promises: the offers that `goodput` weighs.

A round that is looked at while it is drafted takes another time than one that is not, for the same
candidates. So offers are reckoned with the costs of their own kind (specdec/policies/measuring.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import sqrt
from typing import NamedTuple

from specdec.policies.base import RoundStart
from specdec.policies.catch_up import owed
from specdec.policies.growing import GrowingPolicy
from specdec.policies.kinds import Kind
from specdec.policies.measuring import LearntCosts

MEMORY = 0.98
"""Weight that is left of a round's goodput, and of what was trimmed, after one more round.

50 rounds are remembered. Raised, the price of a second follows a change later. Set by hand.
"""

TRIED = 64
"""Judged candidates until which a draft is tried if it may pay, as far as is known of it.

What is known of it sooner may be chance, and would stand for long: a probe is seldom. Raised, more
is spent on a draft that is none.
"""

SHARES = 16
"""Steps in which the share of first candidates that are submitted is known.

The seconds of further candidates are kept for each share that occurs. Raised, fewer are met again.
"""


class Offer(NamedTuple):
    """What a round would draft.

    Attributes:
        rows: that would draft.
        length: candidates of each, where nobody looks.
        promised: tokens that this gains.
        debts: seconds that each row owes for what the draft has yet to read.
        rates: of all rows that may draft, in their order: how often a candidate is accepted.
        first: seconds of the first step for the leading rows of these.
    """

    rows: list[int]
    length: int
    promised: float
    debts: dict[int, float]
    rates: list[float]
    first: list[float]


class OfferingPolicy(GrowingPolicy):
    """A policy that weighs what kinds of rounds would draft.

    Attributes:
        looks: whether the round is looked at while it is drafted.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._looks = True
        self._learnt = LearntCosts(self.costs) if self.costs is not None else None
        # First candidates of rows lately: all and those worth verifying; expected tokens of both.
        self._firsts = [8.0, 8.0, 4.0, 4.0]

    @property
    def looks(self) -> bool:
        return self._looks

    def _use(self, looks: bool) -> None:
        """Decide by the costs of rounds that are looked at, or of the others."""
        assert self._learnt is not None, "prepare() comes before the first round"
        self._looks, self.costs = looks, self._learnt.of(looks)

    def _offer(
        self, start: RoundStart, rows: Sequence[int], known: Sequence[int], kind: Kind
    ) -> Offer:
        """What a round of some kind would draft, and what that promises.

        Args:
            start: the round.
            rows: that may draft.
            known: candidates of each row that are known without a draft.
            kind: of the round, whose costs are in use from now on.
        """
        self._use(kind.looks)
        assert self.costs is not None
        rates = [p * rate for p, rate in zip(self.survival, self.typical, strict=True)]
        debts = owed(start, rows, rates, self.costs.draft)
        order = sorted(rows, key=lambda row: self.price * debts[row] - rates[row])
        steps = self.costs.draft.curve(1, len(rows) + sum(known)).tolist()
        reading = (steps[-1] - steps[len(rows) - 1]) / max(sum(known), 1)  # of a known token
        owing = accumulate(debts[row] + known[row] * reading for row in order)
        first = [step + more for step, more in zip(steps, owing, strict=False)]
        share, yielding = 1.0, 1.0  # of chains that nobody looks at all is submitted
        if kind.branches:
            rates = self.passing
        elif kind.looks:
            share, yielding = self._first_ones
        each = [rates[row] for row in order]
        expected = [yielding * rate for rate in each]
        number, length, promised = self._leading(each, expected, first, self.k_max, share)
        if kind == Kind(looks=False, branches=True):
            number, (length, promised) = len(order), self._shape(order)
            promised -= self.price * sum(debts.values())
        return Offer(order[:number], length, promised, debts, each, first)

    def _may_pay(self, offer: Offer) -> bool:
        """Whether drafting would pay at rates a standard error higher, while these are learnt.

        Missing a good draft costs more than finding a bad one out, which is soon done.
        """
        known, rate = self._judged - self.PAIR_WEIGHT, self._accepted / self._judged
        if known >= TRIED:
            return False
        error = sqrt(rate * (1 - rate) / (known + 1))
        hopes = [min(each + error, self.MOST_RATE) for each in offer.rates]
        return self._leading(hopes, hopes, offer.first, self.k_max)[2] > 0

    @property
    def _first_ones(self) -> tuple[float, float]:
        """How much of rows' first candidates was worth verifying lately, and of what they yield.

        Those that are dropped are the unlikely ones: a row takes less of the verification than its
        candidates would, and yields hardly less than they do.
        """
        drawn, kept, hoped, left = self._firsts
        return round(kept / drawn * SHARES) / SHARES, left / hoped

    def _note_trimming(self, counts: Sequence[int], known: Sequence[int]) -> None:
        """Take in which first candidates were worth verifying.

        Args:
            counts: candidates of each row that are submitted.
            known: of each row, those that needed no draft.
        """
        first = self._steps[0]
        each = zip(first.rows, first.after, strict=True)
        kept = [p for row, p in each if counts[row] > known[row]]
        noted = (len(first.after), len(kept), sum(first.after), sum(kept))
        self._firsts = [MEMORY * a + b for a, b in zip(self._firsts, noted, strict=True)]
