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

from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING

import numpy as np

from specdec.acceptance import AcceptanceHead, Estimator
from specdec.calibration import Array, Flags
from specdec.costs import CostModel, CostTable
from specdec.stopping import (
    DraftStep,
    EstimatingPolicy,
    Indices,
    RoundOutcome,
    RoundStart,
    RowMemory,
)

if TYPE_CHECKING:
    from specdec.packed import PackedDecoder

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
        self._measured: list[tuple[CostTable, int, float]] = []
        # `_further` of the tables as they are, by its arguments.
        self._furthers: dict[tuple[int, int, float], Array] = {}

    def prepare(self, target: PackedDecoder, draft: PackedDecoder, slots: int) -> None:
        if self.costs is None:
            self.costs = CostModel.profile(target, draft, slots)

    def costs_table(self) -> dict[str, list[tuple[int, float]]]:
        return self.costs.points() if self.costs is not None else {}

    def budget(self, start: RoundStart) -> Sequence[int]:
        assert self.costs is not None, "prepare() comes before the first round"
        budget = [0] * len(start.rows)
        self._probing, self._steps = False, []
        speculating = [row for row, room in enumerate(start.room) if room > 0]
        if not speculating or self._stands(start):
            return budget
        self._begin(start)
        lacking = [start.draft_pending[row] for row in speculating]
        rows = np.array(speculating)
        owed = self._owed(start, rows, lacking)
        order = np.argsort(self._value * owed - self.typical[rows], kind="stable")
        rows, owed = rows[order], owed[order]
        first = self.costs.draft.curve(1, len(rows)) + np.cumsum(owed)
        share, yielding = self._first_ones
        value = yielding * self.typical[rows]
        worth, promised = self._worth(rows, value, first, self.k_max, share)
        self._promised = promised / len(rows)
        if self._promised > self._missing:
            chosen = rows[:worth].tolist()
        else:
            chosen = self._probe(speculating, lacking)
            self._probing = True
            final = not chosen and all(start.decoding)
            self._rested, self._resting = start.rows, REST if final else 0
        for row in chosen:
            budget[row] = self.k_max
        for row, seconds in zip(rows.tolist(), owed.tolist(), strict=True):
            if budget[row]:
                start.rows[row].catch_up = seconds
        return budget

    def _begin(self, start: RoundStart) -> None:
        super()._begin(start)
        assert self.costs is not None
        self._free_trimming = start.free_trimming
        self._kept = np.zeros(len(start.rows), dtype=np.int64)
        self._tokens_bare = self._tokens_fed = start.target_tokens
        # What a second is worth: the tokens that it yields as this pair has been doing of late.
        rows = sum(room > 0 for room in start.room)
        plain = rows / float(self.costs.verify(rows))
        self._value = plain * max(1.0, self._tokens / self._seconds)
        # Of each row, how many candidates a chain of 1, 2, ... AHEAD ones yields, if the first is
        # worth one: 1 + rate + rate^2 + ...
        rate = self.typical[:, None]
        self._chains = (1 - rate**_STEPS) / (1 - rate)

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

    def _owed(self, start: RoundStart, rows: Indices, lacking: Sequence[int]) -> Array:
        """Seconds a round that each row owes for what its draft had to read of it: float [n].

        It is read once, in the first of the rounds that a row has left, and all of them share the
        cost. Else each new row would join those that have paid, and no row would earn its prompt.
        """
        assert self.costs is not None
        owed = np.array([start.rows[row].catch_up for row in rows.tolist()])
        if max(lacking) <= USUAL:
            return owed
        # All that lack something are taken to read it at once: those that came together do.
        total, draft = sum(lacking), self.costs.draft
        a_token = max(float(draft(total) - draft(USUAL * len(rows))), 0.0) / total
        # Where it is a close call, a round has about one candidate for each row.
        rounds = np.array(start.room)[rows] / (1 + self.typical[rows])
        owed += a_token * np.array(lacking) / np.clip(rounds, 1, CATCH_UP_ROUNDS)
        return owed

    def _probe(self, rows: Sequence[int], lacking: Sequence[int]) -> list[int]:
        """Which of the rows try speculation although it does not promise to pay: mostly none."""
        assert self.costs is not None
        cheapest = sorted(range(len(rows)), key=lacking.__getitem__)[:PROBE_ROWS]
        bare, verify = self._tokens_bare, self.costs.verify
        cost = float(self.costs.draft(sum(lacking[i] for i in cheapest)))
        cost += float(verify(bare + len(cheapest)) - verify(bare))
        cost /= float(verify(bare))
        if self._allowance < cost:
            return []
        self._allowance -= cost
        return [rows[i] for i in cheapest]

    def go_on(self, step: DraftStep) -> Flags:
        assert self.costs is not None
        rows, alive = step.rows, self.survival[step.rows]
        judged = self._judge(step)
        left = self.k_max - step.depth
        kept = np.arange(len(rows))
        if not self._free_trimming:
            if not (self._probing and step.depth == 1):
                kept = self._best(rows, alive * judged.before, np.zeros(len(rows)), left + 1)
            self._kept[rows[kept]] = step.depth
        self._tokens_fed += len(kept)
        going = np.zeros(len(rows), dtype=bool)
        if left and len(kept):
            survival, rows = judged.survival[kept], rows[kept]
            next_step = self.costs.draft.curve(1, len(kept))
            best = self._best(rows, survival * self.typical[rows], next_step, left)
            going[kept[best]] = True
        return going

    def submit(self, drafted: Sequence[int]) -> Sequence[int]:
        counts = self._choose(drafted) if self._free_trimming else self._kept.tolist()
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
        after = first.after.tolist()
        kept = [p for row, p in zip(first.rows.tolist(), after, strict=True) if counts[row]]
        booked = (len(after), len(kept), sum(after), sum(kept))
        self._firsts = [self.MEMORY * a + b for a, b in zip(self._firsts, booked, strict=True)]

    def _choose(self, drafted: Sequence[int]) -> Sequence[int]:
        """How many of each row's candidates are worth verifying, now that all are drawn."""
        # All candidates by survival: a prefix of this order holds a prefix of every row, since a
        # row's survival falls with every candidate. So one pass over all sizes is the whole search.
        rows = np.concatenate([step.rows for step in self._steps])
        survival = np.concatenate([step.survival for step in self._steps])
        order = np.argsort(-survival, kind="stable")
        assert self.costs is not None
        seconds = self.costs.verify.curve(self._tokens_bare, self._tokens_bare + len(order))
        gain = np.cumsum(survival[order]) - self._value * (seconds[1:] - seconds[0])
        best = int(gain.argmax())
        if gain[best] <= 0:
            return [0] * len(drafted)
        if best + 1 == len(order):
            return drafted
        counts: list[int] = np.bincount(rows[order[: best + 1]], minlength=len(drafted)).tolist()
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
            self._measured.append((self.costs.draft, tokens, seconds))
        tokens, seconds = outcome.verify_cost
        self._measured.append((self.costs.verify, tokens, seconds))
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
        if len(self._measured) >= TOGETHER:
            for table, tokens, seconds in self._measured:
                table.observe(tokens, seconds)
            self._measured = []
            self._furthers = {}

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

    def _best(self, rows: Indices, value: Array, first: Array, left: int) -> Indices:
        """Which of n rows to take one step further, as indices into them; else as `_worth`."""
        order = np.argsort(-value, kind="stable")
        n, gain = self._worth(rows[order], value[order], first, left)
        return order[: n if gain > 0 else 0]

    def _worth(
        self, rows: Indices, value: Array, first: Array, left: int, share: float = 1.0
    ) -> tuple[int, float]:
        """How many of the leading rows to take further, and what that yields beyond its cost.

        Considers every number j of rows and up to AHEAD steps: the first adds `value` expected
        tokens per row, each later one the row's rate times the one before.

        Args:
            rows: int [n].
            value: float [n], expected tokens of the next candidate of each row, falling.
            first: float [n], seconds that the first step takes for the leading 1..n rows.
            left: most candidates that the rows may still get.
            share: how much of them will be submitted.

        Returns:
            The best number, at least 1, and the tokens that it gains; less than 0 if it loses.
        """
        tokens = np.cumsum(value[:, None] * self._chains[rows, :left], 0)
        seconds = self._further(len(rows), share)[:, :left] + first[:, None]
        gain = tokens - self._value * seconds
        most = int(gain.argmax())
        return most // gain.shape[1] + 1, float(gain.flat[most])

    def _further(self, n: int, share: float) -> Array:
        """Seconds of 1..AHEAD more candidates of each of 1..n rows, less the first draft step.

        Args:
            share: how much of them will be submitted.

        Returns:
            float [n, AHEAD].
        """
        assert self.costs is not None
        fed = self._tokens_fed
        if (fed, n, share) not in self._furthers:
            j = np.arange(1, n + 1)[:, None]
            verify = self.costs.verify.curve(fed, fed + n * AHEAD)
            submitted = np.rint(share * j * _STEPS).astype(int)
            drafting = self.costs.draft.curve(1, n)[:, None] * (_STEPS - 1)
            self._furthers[fed, n, share] = verify[submitted] - verify[0] + drafting
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
