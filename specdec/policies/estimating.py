"""Policies that look at candidates: confidence, entropy, head, and what all that estimate share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.measure.calibration import Array, Flags
from specdec.policies.base import (
    MOST_CANDIDATES,
    DraftStep,
    Explanation,
    Head,
    RoundOutcome,
    RoundStart,
    Signal,
    StopPolicy,
)
from specdec.policies.estimators import Estimator, HeadEstimator
from specdec.policies.settings import setting


@dataclass
class Confidence(StopPolicy):
    """Hugging Face's assisted generation: stop after a candidate less likely than `threshold`.

    The likelihood is the draft's own, before temperature, so that it also means something when
    greedy. The unlikely candidate itself is still submitted.
    """

    name = "confidence"
    summary = "stops after a candidate to which the draft gave less than `threshold`"
    wanted = frozenset({Signal.LOG_Q})

    threshold: float = setting(0.4, 0, 1, "stop after a candidate that the draft finds less likely")
    k_max: int = setting(20, 1, MOST_CANDIDATES, "most candidates of a round")

    def budget(self, start: RoundStart) -> Sequence[int]:
        return [self.k_max] * len(start.rows)

    def go_on(self, step: DraftStep) -> Flags:
        flags: Flags = step.signals[:, Signal.LOG_Q] >= np.log(self.threshold)
        return flags


@dataclass
class Entropy(StopPolicy):
    """AdaEDL (arXiv 2410.18351): stop where 1 - sqrt(0.2 H) falls below `threshold`.

    H is the entropy of the draft's distribution; the expression bounds the acceptance rate from
    below. The candidate drawn from that distribution is still submitted.
    """

    name = "entropy"
    summary = "stops where the draft's entropy bounds acceptance below `threshold` (AdaEDL)"
    wanted = frozenset({Signal.ENTROPY})

    threshold: float = setting(0.4, 0, 1, "stop where the bound on acceptance is lower")
    k_max: int = setting(20, 1, MOST_CANDIDATES, "most candidates of a round")

    def budget(self, start: RoundStart) -> Sequence[int]:
        return [self.k_max] * len(start.rows)

    def go_on(self, step: DraftStep) -> Flags:
        flags: Flags = 1 - np.sqrt(0.2 * step.signals[:, Signal.ENTROPY]) >= self.threshold
        return flags


@dataclass(slots=True)
class _Judgement:
    """One draft step as an estimator saw it, by row."""

    rows: list[int]
    signals: Array
    before: list[float]
    after: list[float]
    survival: list[float]


@dataclass(eq=False)
class EstimatingPolicy(StopPolicy):
    """A policy with an estimator: keeps each row's survival and teaches the estimator.

    The survival of a row is the estimated probability that all its candidates so far are accepted.

    Attributes:
        estimator: acceptance probabilities from signals.
        head: the module behind the head's signals.
    """

    estimates = True
    learns_late = True

    PRIOR_RATE = 0.6
    """Acceptance rate of a pair before anything was judged.

    Raised, the first rounds draft more. Between what useless and good drafts have; it soon fades.
    """

    PAIR_WEIGHT = 8.0
    """Candidates that this rate is worth. Raised, a good draft is found out later."""

    PRIOR_WEIGHT = 24.0
    """Candidates that the pair's rate is worth to a new row.

    Raised, rows are told apart later; lowered, chance makes rows look different. Rates of
    rows differ by 0.03 and 0.09 (standard deviation) in two recorded pairs, which makes 118 and 22.
    """

    FORGET = 0.998
    """Weight that is left of the pair's old evidence after one more candidate: 500 are remembered.

    Raised, a change of the text is noticed later. Set by hand.
    """

    LEAST_KEPT = 0.98
    """The least that FORGET leaves after a round, however many rows it has: 50 are remembered.

    Lowered, one round of 256 rows would be all that is remembered, and chance would switch
    speculation off where it gains little.
    """

    LEAST_RATE, MOST_RATE = 0.02, 0.98
    """What a row's rate is kept within: beyond, its odds would drown all that signals say."""

    estimator: Estimator
    head: Head | None = None

    def __post_init__(self) -> None:
        self.wanted = self.estimator.wanted
        self._judged, self._accepted = self.PAIR_WEIGHT, self.PAIR_WEIGHT * self.PRIOR_RATE
        self._steps: list[_Judgement] = []
        self._odds: Sequence[Sequence[float]] = ()  # of known candidates, by row, if it looks

    @property
    def fell_back(self) -> bool:
        return isinstance(self.estimator, HeadEstimator) and self.estimator.fallen_back

    def _begin(self, start: RoundStart) -> None:
        """Start a round: nothing drafted, all rows alive."""
        self._steps = []
        weight, known = self.PRIOR_WEIGHT, self.PRIOR_WEIGHT * self._accepted / self._judged
        rates = [(r.history.accepted + known) / (r.history.judged + weight) for r in start.rows]
        self.typical = [min(max(rate, self.LEAST_RATE), self.MOST_RATE) for rate in rates]
        self.survival = [1.0] * len(rates)
        start.notes["judged"] = self._steps, self.typical

    def _judge(self, step: DraftStep) -> _Judgement:
        """Estimate the candidates just drawn and take them into the rows' survival."""
        (judged,) = self._judged_all([step], self.typical, self.survival)
        self._steps.append(judged)
        return judged

    def _judged_all(
        self, steps: Sequence[DraftStep], rates: Sequence[float], survival: list[float]
    ) -> list[_Judgement]:
        """Estimate the candidates of draft steps at once.

        Args:
            steps: one after the other.
            rates: of all rows of the round.
            survival: of these, up to the steps; includes them then.
        """
        signals = (
            steps[0].signals if len(steps) == 1 else np.concatenate([s.signals for s in steps])
        )
        rows: list[list[int]] = [step.rows.tolist() for step in steps]
        typical = np.array([rates[row] for each in rows for row in each])
        before, after = (p.tolist() for p in self.estimator.predict(signals, typical))
        judged, begin = list[_Judgement](), 0
        for step, each in zip(steps, rows, strict=True):
            these = slice(begin, begin + len(each))
            for row, p in zip(each, after[these], strict=True):
                survival[row] *= p
            reached = [survival[row] for row in each]
            judged.append(_Judgement(each, step.signals, before[these], after[these], reached))
            begin += len(each)
        return judged

    def observe(self, outcome: RoundOutcome) -> None:
        start = outcome.start
        steps, rates = start.notes.get("judged", ((), ()))
        if unseen := outcome.unseen():
            reached = start.notes.get("reached") or [1.0] * len(rates)
            steps += self._judged_all(unseen, rates, reached)
        if not steps:
            return
        submitted, accepted = outcome.submitted, outcome.accepted
        if any(outcome.known):  # those of the draft come behind; -1: these were not reached
            submitted = [max(n - k, 0) for n, k in zip(submitted, outcome.known, strict=True)]
            accepted = [max(n - k, -1) for n, k in zip(accepted, outcome.known, strict=True)]
        # Up to a row's first rejected candidate all were judged; what comes after it was not.
        judged = [min(a + 1, most) for a, most in zip(accepted, submitted, strict=True)]
        # A candidate that was not submitted, behind accepted ones, counts as what it was taken for:
        # those dropped are the unlikely ones, and without them a row's rate would be too high.
        dropped: dict[int, float] = {}
        # In plain Python: an array operation takes longer after a forward than all of this.
        known, rows, stood, at = [], [], [], 0
        for depth, step in enumerate(steps):
            for row, predicted in zip(step.rows, step.after, strict=True):
                if depth < judged[row]:
                    stands = depth < accepted[row]
                    start.rows[row].judged.append((start.contexts[row], predicted, stands))
                    known.append(at)
                    rows.append(row)
                    stood.append(stands)
                elif depth == submitted[row] == accepted[row]:
                    dropped[row] = predicted
                at += 1
        for i, memory in enumerate(start.rows):
            if judged[i] or i in dropped:
                memory.history.add(judged[i] + (i in dropped), accepted[i] + dropped.get(i, 0.0))
        reached = sum(judged) + len(dropped)
        kept = max(self.FORGET**reached, self.LEAST_KEPT)
        self._judged = self._judged * kept + reached
        self._accepted = self._accepted * kept + sum(stood) + sum(dropped.values())
        if known:
            signals = np.concatenate([step.signals for step in steps])[known]
            typical = np.array([rates[row] for row in rows])
            self.estimator.learn(signals, typical, np.array(stood))

    def explain(self, row: int) -> Explanation:
        predicted = tuple(
            p
            for step in self._steps
            for p, owner in zip(step.after, step.rows, strict=True)
            if owner == row
        )
        known = tuple(self._odds[row]) if self._odds else ()
        return Explanation(predicted, self._reason(row, len(predicted)), known)

    def _reason(self, row: int, drafted: int) -> str:
        raise NotImplementedError


@dataclass(eq=False)
class HeadPolicy(EstimatingPolicy):
    """SpecDec++ (arXiv 2405.19715): stop once P(some candidate is rejected) exceeds `threshold`.

    The threshold h is on 1 - prod p. The optimal stop is a threshold (theorem 3.1 there), at
    (c2 + d) / (c1 + c2 + d) for costs c1 of a draft step and c2 of the rest of a round. As
    published, a trained head estimates p; any estimator will do.
    """

    name = "head"
    summary = "stops once the risk that a candidate is rejected exceeds `threshold` (SpecDec++)"
    needs_head = True

    threshold: float = setting(0.7, 0, 1, "stop where the risk of a rejection is higher")
    k_min: int = setting(1, 0, MOST_CANDIDATES, "least candidates of a round")
    k_max: int = setting(20, 1, MOST_CANDIDATES, "most candidates of a round")

    def budget(self, start: RoundStart) -> Sequence[int]:
        self._begin(start)
        return [self.k_max] * len(start.rows)

    def go_on(self, step: DraftStep) -> Flags:
        judged = self._judge(step)
        few = step.depth < self.k_min
        return np.array([few or 1 - alive <= self.threshold for alive in judged.survival])

    def _reason(self, row: int, drafted: int) -> str:
        risk = 1 - self.survival[row]
        return f"after {drafted}: P(some rejected) {risk:.2f}, threshold {self.threshold:.2f}"
