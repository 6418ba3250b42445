"""The policy `goodput`: SpecDec++'s stopping problem for a batch, under measured costs.

A round commits one token per row plus what is accepted, and takes the time of its draft steps and
of one verification. Over many rounds tokens per second is largest if every round maximises

    expected tokens - value * seconds,        value = the goodput reached (tokens per second),

the renewal-reward form of the decision process of arXiv 2405.19715, in which `value` takes the
place of the threshold (DESIGN.md §4). Each decision below is this difference for one more step:
which rows to draft for, which to draft on for, which candidates to verify, and whether to speculate
at all. Costs come from a `CostModel`, probabilities from an `Estimator`.

What estimates leave out shows in results: by how much rounds with candidates have yielded less than
they promised is taken off the next promise, and where too little is left nothing is drafted.

What may be trimmed. In matching modes any candidate may be dropped, so the verified set is chosen
when all are drawn. Under rejection sampling y_k may be dropped by what was known before it was
drawn: after the draft step that made its distribution, by the estimate that does not know it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf
from operator import is_
from typing import TYPE_CHECKING

import numpy as np

from specdec.measure.calibration import Flags
from specdec.policies.base import DraftStep, RoundOutcome, RoundStart, RowMemory
from specdec.policies.costs import CostModel
from specdec.policies.estimating import EstimatingPolicy
from specdec.policies.estimators import Estimator

if TYPE_CHECKING:
    from specdec.model.decoder import PackedDecoder
    from specdec.policies.signals import AcceptanceHead

AHEAD = 8
"""Draft steps to look ahead: a staircase of costs may repay two candidates where one does not."""

KEPT = 0.9988
"""Weight that is left of what promises lacked after one more row and round."""

TRUST_AGAIN = 0.999
"""Weight that is left of the correction after a round without candidates: it is looked at anew."""

IN_A_ROW, CLOSE = 64, 0.2
"""Most rounds with candidates before one without, lest it is forgotten what such a round costs; as
long as speculation promises less speedup than this, so that there are two sides to compare."""

PROBE_SHARE = 0.005
"""Share of time that is spent on trying speculation again where it has not paid."""

PROBE_ROWS = 4

PROBE_SAVINGS = 10.0
"""Rounds' worth of time that may be saved up for probes, and that the first ones may take."""

REST = 7
"""Rounds for which a decision against speculation stands, as long as the rows are the same."""

USUAL = 2
"""Tokens of a row that a first draft step reads where the last candidates all stand, at most."""

CATCH_UP_ROUNDS = 64
"""Most rounds that share the cost of feeding the draft a prompt, or what it missed while unused."""

TOGETHER = 16
"""Measurements that are collected before the cost tables learn from them."""

SHARES = 16
"""Steps in which the share of candidates that are submitted is known: costs are kept for each."""

_STEPS = np.arange(1, AHEAD + 1)


class Goodput(EstimatingPolicy):
    """Maximises committed tokens per second; K = 0 where speculation does not pay.

    Args:
        estimator, head: where probabilities come from.
        costs: D(n) and V(n); by default profiled before the first round.
        k_max: most candidates per row.
    """

    MEMORY = 0.98
    """Weight that is left of a round's goodput after one more round."""

    def __init__(
        self,
        estimator: Estimator,
        head: AcceptanceHead | None = None,
        costs: CostModel | None = None,
        k_max: int = 20,
    ) -> None:
        super().__init__(estimator, head)
        self.costs, self.k_max = costs, k_max
        # Tokens per row and seconds, both relative to a round without speculation.
        self._tokens, self._seconds = 5.0, 5.0
        # Time saved up for probes, in rounds without speculation.
        self._allowance = PROBE_SAVINGS
        self._in_a_row = 0
        # Rows that were found not worth it, and for how many rounds this stands.
        self._rested: Sequence[RowMemory] = []
        self._resting = 0
        # First candidates of rows lately: all and those worth verifying; expected tokens of both.
        self._firsts = [8.0, 8.0, 4.0, 4.0]
        # Tokens a row and round that speculation promised lately beyond what it kept.
        self._promised, self._missing = 0.0, 0.0
        # Seconds since the cost tables learnt last, by what learns them and by tokens.
        self._measured: dict[tuple[Callable[..., None], int], list[float]] = {}
        # `_further` of the tables as they are, by its arguments.
        self._furthers: dict[tuple[int, int, float], list[list[float]]] = {}

    def prepare(self, target: PackedDecoder, draft: PackedDecoder, slots: int) -> None:
        if self.costs is None:
            from specdec.policies.profiling import profile_costs  # torch: policies load without

            self.costs = profile_costs(target, draft, slots)

    def costs_table(self) -> dict[str, list[tuple[int, float]]]:
        return self.costs.points() if self.costs is not None else {}

    def budget(self, start: RoundStart) -> Sequence[int]:
        assert self.costs is not None, "prepare() comes before the first round"
        budget = [0] * len(start.rows)
        self._probing, self._steps = False, []
        rows = [row for row, room in enumerate(start.room) if room > 0]
        if not rows or self._stands(start):
            return budget
        self._begin(start)
        owed, rates = self._owed(start, rows), self.typical
        rows.sort(key=lambda row: self._value * owed[row] - rates[row])
        steps = self.costs.draft.curve(1, len(rows)).tolist()
        owing = accumulate(owed[row] for row in rows)
        first = [step + more for step, more in zip(steps, owing, strict=True)]
        share, yielding = self._first_ones
        value = [yielding * rates[row] for row in rows]
        worth, promised = self._worth(rows, value, first, self.k_max, share)
        self._promised = promised / len(rows)
        if self._promised > self._missing:
            chosen = rows[:worth]
        else:
            chosen = self._probe(start, sorted(rows))
            self._probing = True
            final = not chosen and all(start.decoding)
            self._rested, self._resting = start.rows, REST if final else 0
        for row in chosen:
            budget[row] = self.k_max
            start.rows[row].catch_up = owed[row]
        return budget

    def _begin(self, start: RoundStart) -> None:
        super()._begin(start)
        assert self.costs is not None
        self._free_trimming = start.free_trimming
        self._kept = [0] * len(start.rows)
        self._tokens_bare = self._tokens_fed = start.target_tokens
        # What a second is worth: the tokens that it yields as this pair has been doing of late.
        rows = sum(room > 0 for room in start.room)
        plain = rows / float(self.costs.verify(rows))
        self._value = plain * max(1.0, self._tokens / self._seconds)

    def _stands(self, start: RoundStart) -> bool:
        """Whether this round is one without candidates, and nothing needs to be computed for it.

        Asked once a round: it counts the rounds for which a decision stands.
        """
        if self._look_again and all(start.decoding):
            return True
        # Nothing that was promised too little for these rows grows while they go on without.
        self._resting -= 1
        same = len(start.rows) == len(self._rested) and all(map(is_, start.rows, self._rested))
        return same and self._resting >= 0 and all(start.decoding)

    @property
    def _look_again(self) -> bool:
        """Whether it is time for a round without candidates."""
        return self._in_a_row >= IN_A_ROW and self._promised - self._missing < CLOSE

    def _owed(self, start: RoundStart, rows: Sequence[int]) -> dict[int, float]:
        """Seconds a round that each of some rows owes for what its draft had to read of it.

        It is read once, in the first of the rounds that a row has left, and all of them share the
        cost. Else each new row would join those that have paid, and no row would earn its prompt.
        """
        assert self.costs is not None
        owed = {row: start.rows[row].catch_up for row in rows}
        lacking = {row: start.draft_pending[row] for row in rows}
        if max(lacking.values()) <= USUAL:
            return owed
        # All that lack something are taken to read it at once: those that came together do.
        total, draft = sum(lacking.values()), self.costs.draft
        a_token = max(float(draft(total) - draft(USUAL * len(rows))), 0.0) / total
        for row in rows:
            # Where it is a close call, a round has about one candidate for each row.
            rounds = start.room[row] / (1 + self.typical[row])
            owed[row] += a_token * lacking[row] / min(max(rounds, 1.0), CATCH_UP_ROUNDS)
        return owed

    def _probe(self, start: RoundStart, rows: Sequence[int]) -> list[int]:
        """Which of the rows try speculation although it does not promise to pay: mostly none."""
        assert self.costs is not None
        cheapest = sorted(rows, key=start.draft_pending.__getitem__)[:PROBE_ROWS]
        bare, verify = self._tokens_bare, self.costs.verify
        cost = float(self.costs.draft(sum(start.draft_pending[row] for row in cheapest)))
        cost += float(verify(bare + len(cheapest)) - verify(bare))
        cost /= float(verify(bare))
        if self._allowance < cost:
            return []
        self._allowance -= cost
        return cheapest

    def go_on(self, step: DraftStep) -> Flags:
        assert self.costs is not None
        alive = [*self.survival]
        judged = self._judge(step)
        rows = judged.rows
        left, kept = self.k_max - step.depth, rows
        if not self._free_trimming:
            if not (self._probing and step.depth == 1):
                each = zip(rows, judged.before, strict=True)
                reached = {row: alive[row] * before for row, before in each}
                kept = self._best(reached, [0.0] * len(kept), left + 1)
            for row in kept:
                self._kept[row] = step.depth
        self._tokens_fed += len(kept)
        going = set[int]()
        if left and kept:
            expected = {row: self.survival[row] * self.typical[row] for row in kept}
            next_step = self.costs.draft.curve(1, len(kept)).tolist()
            going = set(self._best(expected, next_step, left))
        return np.array([row in going for row in rows])

    def submit(self, drafted: Sequence[int]) -> Sequence[int]:
        counts = self._choose(drafted) if self._free_trimming else self._kept
        self._book_trimming(counts)
        return drafted if self._free_trimming and self._probing else counts

    @property
    def _first_ones(self) -> tuple[float, float]:
        """How much of rows' first candidates was worth verifying lately, and of what they yield.

        Those that are dropped are the unlikely ones: a row takes less of the verification than its
        candidates would, and yields hardly less than they do.
        """
        drawn, kept, hoped, left = self._firsts
        return round(kept / drawn * SHARES) / SHARES, left / hoped

    def _book_trimming(self, counts: Sequence[int]) -> None:
        """Take in which first candidates were worth verifying, by each row's count of them."""
        first = self._steps[0]
        kept = [p for row, p in zip(first.rows, first.after, strict=True) if counts[row]]
        booked = (len(first.after), len(kept), sum(first.after), sum(kept))
        self._firsts = [self.MEMORY * a + b for a, b in zip(self._firsts, booked, strict=True)]

    def _choose(self, drafted: Sequence[int]) -> Sequence[int]:
        """How many of each row's candidates are worth verifying, now that all are drawn."""
        # All candidates by survival: a prefix of this order holds a prefix of every row, since a
        # row's survival falls with every candidate. So one pass over all sizes is the whole search.
        assert self.costs is not None
        every = [
            (survival, row)
            for step in self._steps
            for survival, row in zip(step.survival, step.rows, strict=True)
        ]
        every.sort(key=lambda candidate: -candidate[0])
        bare, *seconds = self.costs.verify.curve(
            self._tokens_bare, self._tokens_bare + len(every)
        ).tolist()
        expected, most, best = 0.0, 0.0, 0
        for n, (survival, _) in enumerate(every):
            expected += survival
            gain = expected - self._value * (seconds[n] - bare)
            if gain > most:
                most, best = gain, n + 1
        counts = [0] * len(drafted)
        for _, row in every[:best]:
            counts[row] += 1
        return counts

    def observe(self, outcome: RoundOutcome) -> None:
        super().observe(outcome)
        if self.costs is None:
            return
        if any(outcome.drafted) and not self._probing:
            self._compare(outcome)
        if not all(outcome.start.decoding):
            self._furthers = {}  # sizes with a prompt in them hardly come again, and would pile up
            return
        for tokens, seconds in outcome.draft_costs:
            self._measured.setdefault((self.costs.observe_draft, tokens), []).append(seconds)
        tokens, seconds = outcome.verify_cost
        self._measured.setdefault((self.costs.observe_verify, tokens), []).append(seconds)
        rows = len(outcome.start.rows)
        committed = sum(outcome.accepted) + rows
        spent = seconds + sum(spent for _, spent in outcome.draft_costs)
        self._tokens = self.MEMORY * self._tokens + committed / rows
        # A pause of the machine is not what speculation costs.
        relative = min(spent / float(self.costs.verify(rows)), 20.0)
        self._seconds = self.MEMORY * self._seconds + relative
        self._in_a_row += 1
        if not any(outcome.drafted):
            self._in_a_row = 0
            self._missing *= TRUST_AGAIN
            self._allowance = min(self._allowance + PROBE_SHARE * relative, PROBE_SAVINGS)
        if sum(map(len, self._measured.values())) >= TOGETHER:
            for (learn, tokens), measured in self._measured.items():
                learn(tokens, *measured)
            self._measured, self._furthers = {}, {}

    def _compare(self, outcome: RoundOutcome) -> None:
        """Take in by how much a round with candidates yielded less than it promised.

        What the draft had to catch up with is not what this round took for it but what it owes.
        """
        assert self.costs is not None
        start, draft, verify = outcome.start, self.costs.draft, self.costs.verify
        tokens, seconds = outcome.verify_cost
        if not all(start.decoding):  # then most of it is prefill
            seconds = float(verify(tokens))
        seconds += sum(spent for _, spent in outcome.draft_costs)
        owed = [row.catch_up for row, k in zip(start.rows, outcome.drafted, strict=True) if k]
        read, usual = outcome.draft_costs[0][0], USUAL * len(owed)
        if read > usual:
            seconds -= float(draft(read) - draft(usual))
        seconds += sum(owed)
        extra = seconds - float(verify(start.target_tokens))
        kept = (sum(outcome.accepted) - self._value * extra) / sum(k > 0 for k in start.room)
        missing = min(max(self._promised - kept, -1.0), 1.0)  # a pause of the machine is neither
        weight = KEPT ** len(start.rows)
        self._missing = weight * self._missing + (1 - weight) * missing

    def _best(self, value: dict[int, float], first: Sequence[float], left: int) -> list[int]:
        """Which rows to take one step further, by what that is expected to yield of each."""
        rows = sorted(value, key=lambda row: -value[row])
        n, gain = self._worth(rows, [value[row] for row in rows], first, left)
        return rows[:n] if gain > 0 else []

    def _worth(
        self,
        rows: Sequence[int],
        value: Sequence[float],
        first: Sequence[float],
        left: int,
        share: float = 1.0,
    ) -> tuple[int, float]:
        """How many of the leading rows to take further, and what that yields beyond its cost.

        Considers every number j of rows and up to AHEAD steps: the first adds `value` expected
        tokens per row, each later one the row's rate times the one before.

        Args:
            rows: n of them.
            value: expected tokens of the next candidate of each row, falling.
            first: seconds that the first step takes for the leading 1..n rows.
            left: most candidates that the rows may still get.
            share: how much of them will be submitted.

        Returns:
            The best number, at least 1, and the tokens that it gains; less than 0 if it loses.
        """
        # In plain Python: an array operation takes longer after a forward than a row does here.
        tokens = [0.0] * min(left, AHEAD)
        number, most = 1, -inf
        further = self._further(len(rows), share)
        for j, (row, expected, seconds) in enumerate(zip(rows, value, first, strict=True)):
            rate, chain = self.typical[row], 0.0
            for step, more in zip(range(len(tokens)), further[j], strict=False):
                chain += expected
                expected *= rate
                tokens[step] += chain
                gain = tokens[step] - self._value * (seconds + more)
                if gain > most:
                    number, most = j + 1, gain
        return number, most

    def _further(self, n: int, share: float) -> list[list[float]]:
        """Seconds of 1..AHEAD more candidates of each of 1..n rows, less the first draft step.

        Args:
            share: how much of them will be submitted.

        Returns:
            n lists of AHEAD.
        """
        assert self.costs is not None
        fed = self._tokens_fed
        if (fed, n, share) not in self._furthers:
            j = np.arange(1, n + 1)[:, None]
            verify = self.costs.verify.curve(fed, fed + n * AHEAD)
            submitted = np.rint(share * j * _STEPS).astype(int)
            drafting = self.costs.draft.curve(1, n)[:, None] * (_STEPS - 1)
            further = verify[submitted] - verify[0] + drafting
            self._furthers[fed, n, share] = further.tolist()
        return self._furthers[fed, n, share]

    def _reason(self, row: int, drafted: int) -> str:
        if self._look_again and not self._steps:
            return f"{IN_A_ROW} rounds had candidates; what one without them costs is to be seen"
        if not drafted:
            return f"no candidate repays its cost at {self._value:.0f} tokens/s"
        return (
            f"after {drafted}: another is reached with probability {self.survival[row]:.2f}, "
            f"at {self._value:.0f} tokens/s too little for its cost"
        )
