"""Whether to speculate at all: what speculation promised, what it kept, and when to try it again.

Estimates leave things out: other work of the machine, prompts to come, rows that end early. So the
switch compares what rounds with candidates promised with what they yielded. What was surely missing
lately is taken off the next promise. Where nothing is left, nothing is drafted.

A switch that is off learns nothing about what it does not do. So now and then a few rows are tried:
a *probe*, paid from time that was saved up for it. And where speculation pays a little only, a
round without candidates comes now and then, so that its cost is known as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import copysign, sqrt
from operator import is_

from specdec.policies.base import RoundStart
from specdec.policies.costs import CostModel
from specdec.policies.memory import RowMemory

KEPT = 0.9988
"""Weight that is left of what promises lacked after one more row and round: 830 are remembered.

Raised, a loss is noticed later. Lowered, noise switches off what pays: at one row and a memory of
50 rounds 1.1 to 1.2 times the speed of `none` was left of 1.32 (benchmarks/LOG.md).
"""

LEAST_KEPT = 0.984
"""The least that KEPT leaves after a round, however many rows it has: 64 rounds are remembered.

Lowered, three rounds of 256 rows would be all that is remembered.
"""

SURE = 2.0
"""Standard errors that are taken off what promises seem to lack before it counts.

Raised, small losses last longer. At 0, noise switched off what yields a few percent.
"""

LEAST_VARIANCE = 0.25
"""Least variance of a row's tokens in a round, about what they were expected to be.

A few rounds that happen to agree would otherwise look sure.
"""

TRUST_AGAIN = 0.99
"""Weight that is left of that evidence after a round without candidates.

It becomes less sure, and so counts for less. Raised, speculation that was switched off comes back
later. Set by hand.
"""

IN_A_ROW = 64
"""Most rounds with candidates in a row before one without, while the gain is CLOSE.

Otherwise the cost of such a round would rest on a profile alone. Raised, it is measured less often;
lowered, more rounds go without. Set by hand: 1 round in 64 costs little where the gain is small.
"""

CLOSE = 0.2
"""Tokens per row and round beyond `none`, below which a gain counts as close.

Raised, speculation that surely pays is interrupted, too, without need. Set by hand.
"""

PROBE_SHARE = 0.005
"""Share of time that is spent on probes while speculation does not pay.

Raised, a change is noticed sooner, at that price. At 0.01 twice as much was lost and no more found
(benchmarks/LOG.md).
"""

PROBE_ROWS = 4
"""Rows that a probe drafts for. More tell more about acceptance, and must be saved for longer."""

TRIED_SHARE = 16
"""Of so many rows one is tried where the time for it need not be saved up.

Lowered, a draft of which little is known is found out sooner, and a useless one reads more prompts.
"""

PROBE_SAVINGS = 3.0
"""Time that may be saved up for probes, in rounds without speculation.

Without a bound, a long time off would be followed by as long a time of
probes. With 10, short replays in which speculation is useless lost 3%.
"""

REST = 7
"""Rounds for which a decision against speculation stands while the rows are the same.

Their promises do not grow meanwhile, and computing them anew takes the host 0.4 ms. Raised, the
time that is saved for probes waits longer for its use.
"""


class Switch:
    """Remembers what speculation promised and kept.

    Attributes:
        allowance: time saved up for probes, in rounds without speculation.
    """

    def __init__(self) -> None:
        self.allowance = 0.0
        # Tokens per row and round: of the last decision, and what earlier ones lacked.
        self._promised = 0.0
        # What promises lacked, by row and round: weight, mean and mean square.
        self._weight, self._mean, self._square = 0.0, 0.0, 0.0
        self._in_a_row = 0
        # Rows that were found not worth it, and for how many rounds this stands.
        self._rested: Sequence[RowMemory] = []
        self._resting = 0

    @property
    def missing(self) -> float:
        """What promises surely lack: the mean, less SURE standard errors."""
        error = sqrt(max(self._square - self._mean**2, LEAST_VARIANCE) / max(self._weight, 1.0))
        return copysign(max(abs(self._mean) - SURE * error, 0.0), self._mean)

    @property
    def on(self) -> bool:
        """Whether speculation paid, as far as the last decision knew."""
        return self._promised > self.missing

    @property
    def look_again(self) -> bool:
        """Whether it is time for a round without candidates."""
        return self._in_a_row >= IN_A_ROW and self._promised - self.missing < CLOSE

    def stands(self, start: RoundStart) -> bool:
        """Whether this round is one without candidates, and nothing needs to be computed for it.

        Asked once a round: it counts the rounds for which a decision stands.
        """
        if self.look_again and start.decodes:
            return True
        rests = self.rests(start)
        self._resting -= 1
        return rests

    def rests(self, start: RoundStart) -> bool:
        """Whether a decision against speculation stands for these rows.

        Nothing that was promised too little for them grows while they go on without.
        """
        same = len(start.rows) == len(self._rested) and all(map(is_, start.rows, self._rested))
        return same and self._resting > 0 and start.decodes

    def pays(self, promised: float) -> bool:
        """Whether to speculate, as `promised` tokens per row and round beyond none."""
        self._promised = promised
        return promised > self.missing

    def probe(
        self, start: RoundStart, rows: Sequence[int], costs: CostModel, *, saved_up: bool
    ) -> list[int]:
        """Which rows try speculation although it does not promise to pay: mostly none.

        Args:
            start: the round.
            rows: that may.
            costs: of both models.
            saved_up: whether the time for it must have been saved up.
        """
        most = PROBE_ROWS if saved_up else max(PROBE_ROWS, len(rows) // TRIED_SHARE)
        cheapest = sorted(rows, key=start.draft_pending.__getitem__)[:most]
        bare, verify = start.target_tokens, costs.verify
        cost = float(costs.draft(sum(start.draft_pending[row] for row in cheapest)))
        cost += float(verify(bare + len(cheapest)) - verify(bare))
        cost /= float(verify(bare))
        if saved_up and self.allowance < cost:
            cheapest = []
        else:
            self.allowance = max(self.allowance - cost, 0.0)
        final = not cheapest and start.decodes
        self._rested, self._resting = start.rows, REST if final else 0
        return cheapest

    def kept(self, promised: float, tokens: float, rows: int) -> None:
        """Learn from a round that was promised to pay.

        Args:
            promised: as `pays` was told.
            tokens: what it yielded, per row that could speculate, beyond none.
            rows: live rows.
        """
        missing = min(max(promised - tokens, -1.0), 1.0)  # a pause of the machine is neither
        self._weight = self._weight * max(KEPT**rows, LEAST_KEPT) + rows
        share = rows / self._weight
        self._mean += share * (missing - self._mean)
        self._square += share * (rows * missing**2 - self._square)

    def ended(self, speculated: bool, relative: float) -> None:
        """Count a round that `decodes`.

        Args:
            speculated: whether it had candidates.
            relative: its seconds, in rounds without speculation.
        """
        if speculated:
            self._in_a_row += 1
            return
        self._in_a_row = 0
        self._weight *= TRUST_AGAIN
        self.allowance = min(self.allowance + PROBE_SHARE * relative, PROBE_SAVINGS)
