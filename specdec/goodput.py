"""The policy `goodput`: SpecDec++'s stopping problem for a batch, under measured costs.

A round commits one token per row plus what is accepted, and takes the time of its draft steps and
of one verification. Over many rounds tokens per second is largest if every round maximises

    expected tokens - value * seconds,        value = the goodput reached (tokens per second),

the renewal-reward form of the decision process of arXiv 2405.19715, in which `value` takes the
place of the threshold (DESIGN.md §4). Each decision below is this difference for one more step:
which rows to draft for, which to draft on for, which candidates to verify, and whether to speculate
at all. Costs come from a `CostModel`, probabilities from an `Estimator`.

What may be trimmed. In matching modes any candidate may be dropped, so the verified set is chosen
when all are drawn. Under rejection sampling y_k may be dropped by what was known before it was
drawn: after the draft step that made its distribution, by the estimate that does not know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from specdec.acceptance import AcceptanceHead, Estimator
from specdec.calibration import Array, Flags
from specdec.costs import CostModel
from specdec.stopping import (
    DraftStep,
    EstimatingPolicy,
    Indices,
    RoundOutcome,
    RoundStart,
)

if TYPE_CHECKING:
    from specdec.packed import PackedDecoder

AHEAD = 8
"""Draft steps to look ahead: a staircase of costs may repay two candidates where one does not."""

PROBE_SHARE = 0.01
"""Share of time that is spent on trying speculation again where it has not paid."""

PROBE_ROWS = 4

PROBE_SAVINGS = 10.0
"""Rounds' worth of time that may be saved up for a probe, and that the first one may take."""

CATCH_UP_ROUNDS = 64
"""Most rounds that share the cost of feeding the draft what it missed while it was not used."""


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
        # Time saved up for a probe, in rounds without speculation.
        self._allowance = PROBE_SAVINGS

    def prepare(self, target: PackedDecoder, draft: PackedDecoder, slots: int) -> None:
        if self.costs is None:
            self.costs = CostModel.profile(target, draft, slots)

    def costs_table(self) -> dict[str, list[tuple[int, float]]]:
        return self.costs.points() if self.costs is not None else {}

    def budget(self, start: RoundStart) -> Sequence[int]:
        assert self.costs is not None, "prepare() comes before the first round"
        self._begin(start)
        self._free_trimming = start.free_trimming
        rows = np.flatnonzero(np.array(start.room) > 0)
        self._kept = np.zeros(len(start.rows), dtype=np.int64)
        self._tokens_bare = self._tokens_fed = start.target_tokens
        if not len(rows):
            return [0] * len(start.rows)
        # What a second is worth: the tokens that it yields as this pair has been doing of late.
        plain = len(rows) / float(self.costs.verify(len(rows)))
        self._value = plain * max(1.0, self._tokens / self._seconds)

        rate, lacking = self.typical[rows], np.array(start.draft_pending)[rows]
        order = np.argsort(-rate, kind="stable")
        first = self.costs.draft.curve(1, len(rows))
        first = first + self._catch_up(lacking[order], np.array(start.room)[rows][order], first)
        chosen = rows[order[: self._worth(rate[order], rate[order], first, self.k_max)]]
        self._probing = not len(chosen)
        if self._probing:
            chosen = self._probe(rows, lacking)
        budget = np.zeros(len(start.rows), dtype=np.int64)
        budget[chosen] = self.k_max
        return [int(k) for k in budget]

    def _catch_up(self, lacking: Indices, room: Indices, first: Array) -> Array:
        """Seconds a round for what the draft lacks of the leading 1..n rows: float [n].

        It is read once, in the first of the rounds that a row has left.
        """
        assert self.costs is not None
        # A round commits about two tokens where speculation pays.
        rounds = np.clip(room / 2, 1, CATCH_UP_ROUNDS)
        together = np.cumsum(lacking)
        if together[-1] == len(lacking):  # one token each is what a step reads anyway
            return np.zeros(len(lacking))
        extra = np.maximum(self.costs.draft(together) - first, 0)
        share: Array = extra * np.cumsum(lacking / rounds) / np.maximum(together, 1)
        return share

    def _probe(self, rows: Indices, lacking: Indices) -> Indices:
        """Which of the rows try speculation although it does not promise to pay: mostly none."""
        assert self.costs is not None
        cheapest = np.argsort(lacking, kind="stable")[:PROBE_ROWS]
        n, verify = len(cheapest), self.costs.verify
        cost = float(self.costs.draft(lacking[cheapest].sum()))
        cost += float(verify(self._tokens_bare + n) - verify(self._tokens_bare))
        if self._allowance * float(verify(self._tokens_bare)) < cost:
            return rows[:0]
        self._allowance = 0.0
        return rows[cheapest]

    def go_on(self, step: DraftStep) -> Flags:
        assert self.costs is not None
        rows, rate = step.rows, self.typical[step.rows]
        alive = self.survival[rows]
        judged = self._judge(step)
        left = self.k_max - step.depth
        kept = np.ones(len(rows), dtype=bool)
        if not self._free_trimming and not (self._probing and step.depth == 1):
            kept = self._best(alive * judged.before, rate, np.zeros(len(rows)), left + 1)
        self._kept[rows[kept]] = step.depth
        self._tokens_fed += int(kept.sum())
        going = np.zeros(len(rows), dtype=bool)
        if left and kept.any():
            next_step = self.costs.draft.curve(1, int(kept.sum()))
            value = judged.survival[kept] * rate[kept]
            going[kept] = self._best(value, rate[kept], next_step, left)
        return going

    def submit(self, drafted: Sequence[int]) -> Sequence[int]:
        if not self._free_trimming:
            return [int(k) for k in self._kept]
        if self._probing:
            return drafted
        # All candidates by survival: a prefix of this order holds a prefix of every row, since a
        # row's survival falls with every candidate. So one pass over all sizes is the whole search.
        rows = np.concatenate([step.rows for step in self._steps])
        survival = np.concatenate([step.survival for step in self._steps])
        order = np.argsort(-survival, kind="stable")
        tokens = np.concatenate([[0.0], np.cumsum(survival[order])])
        assert self.costs is not None
        seconds = self.costs.verify.curve(self._tokens_bare, self._tokens_bare + len(order))
        best = int(np.argmax(tokens - self._value * seconds))
        counts = np.bincount(rows[order[:best]], minlength=len(drafted))
        return [int(k) for k in counts]

    def observe(self, outcome: RoundOutcome) -> None:
        super().observe(outcome)
        if self.costs is None or not all(outcome.start.decoding):
            return
        for tokens, seconds in outcome.draft_costs:
            self.costs.draft.observe(tokens, seconds)
        tokens, seconds = outcome.verify_cost
        self.costs.verify.observe(tokens, seconds)
        rows = len(outcome.start.rows)
        committed = sum(outcome.accepted) + rows
        spent = seconds + sum(spent for _, spent in outcome.draft_costs)
        self._tokens = self.MEMORY * self._tokens + committed / rows
        # A pause of the machine is not what speculation costs.
        relative = min(spent / float(self.costs.verify(rows)), 20.0)
        self._seconds = self.MEMORY * self._seconds + relative
        if not any(outcome.drafted):
            self._allowance = min(self._allowance + PROBE_SHARE * relative, PROBE_SAVINGS)

    def _best(self, value: Array, rate: Array, first: Array, left: int) -> Flags:
        """Which of n rows to take one step further: a mask bool [n]; arguments as in `_worth`."""
        order = np.argsort(-value, kind="stable")
        chosen = np.zeros(len(value), dtype=bool)
        chosen[order[: self._worth(value[order], rate[order], first, left)]] = True
        return chosen

    def _worth(self, value: Array, rate: Array, first: Array, left: int) -> int:
        """How many of the leading rows to take further; 0 if no number of them repays its cost.

        Considers every number j of rows and up to AHEAD steps: the first adds `value` expected
        tokens per row, each later one `rate` times the one before.

        Args:
            value: float [n], expected tokens of the next candidate of each row, falling.
            rate: float [n], how fast that shrinks with further candidates.
            first: float [n], seconds that the first step takes for the leading 1..n rows.
            left: most candidates that the rows may still get.
        """
        assert self.costs is not None
        j = np.arange(1, len(value) + 1)
        steps = np.arange(1, min(AHEAD, left) + 1)
        fed, sizes = self._tokens_fed, j[:, None] * steps
        verify = self.costs.verify.curve(fed, fed + len(j) * len(steps))
        falling = rate[:, None] ** steps
        tokens = np.cumsum(value[:, None] * (1 - falling) / (1 - rate[:, None]), 0)
        further = self.costs.draft.curve(1, len(j))
        drafting = first[:, None] + further[:, None] * (steps - 1)
        gain = tokens - self._value * (drafting + verify[sizes] - verify[0])
        most = gain.max(1)
        best = int(most.argmax())
        return best + 1 if most[best] > 0 else 0

    def _reason(self, row: int, drafted: int) -> str:
        if not drafted:
            return f"no candidate repays its cost at {self._value:.0f} tokens/s"
        return (
            f"after {drafted}: another is reached with probability {self.survival[row]:.2f}, "
            f"at {self._value:.0f} tokens/s too little for its cost"
        )
