"""When to stop drafting: the `StopPolicy` seam and the policies that look at one row at a time.

A policy decides per row, in four places of a round:

    budget   before drafting: at most how many candidates for each row
    go_on    after each candidate: which rows draft another one
    submit   before verification: how many of the drafted candidates to submit
    observe  after the round: what was accepted, and what it cost

All of it happens on the host, on arrays over rows. What a policy wants to know of the device comes
as `Signal`s, one transfer per draft step; a policy that wants none never makes the host wait.

The invariant of rejection sampling: whether candidate y_k is *submitted* may depend on y_1..y_{k-1}
and on the draft's distributions, never on y_k itself. `go_on` is safe by construction, since it
sees y_k and decides about y_{k+1}. `submit` must keep to it by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from specdec.measure.calibration import Array, Calibration, Flags
from specdec.policies.estimators import AcceptanceHead, Estimator, HeadEstimator, RowHistory, Signal

if TYPE_CHECKING:
    from specdec.model.decoder import PackedDecoder

Indices = NDArray[np.int64]


@dataclass(slots=True)
class RowMemory:
    """What a policy keeps about one row from round to round.

    Attributes:
        k: the current candidate length of policies that adapt it; 0 before the row's first round.
        catch_up: seconds that each of its rounds owes for what the draft had to read of it, the
            prompt mostly, before it could propose.
        history: how often its candidates were accepted lately.
        judged: of each judged candidate the row's context length, the predicted acceptance and
            whether it stands.
    """

    k: int = 0
    catch_up: float = 0.0
    history: RowHistory = field(default_factory=RowHistory)
    judged: list[tuple[int, float, bool]] = field(default_factory=list)

    def calibration(self) -> dict[int, Calibration]:
        """Predicted against observed acceptance, by class of context length."""
        classes: dict[int, list[tuple[float, bool]]] = {}
        for context, predicted, stands in self.judged:
            classes.setdefault(context_class(context), []).append((predicted, stands))
        result = {}
        for key, candidates in classes.items():
            predictions, verdicts = zip(*candidates, strict=True)
            result[key] = Calibration()
            result[key].add(np.array(predictions), np.array(verdicts))
        return result


@dataclass(frozen=True, slots=True)
class RoundStart:
    """What is known before a round drafts, per row (host numbers).

    Attributes:
        rows: the rows' memories.
        room: most candidates each row may have; 0 while its prompt is being fed.
        decoding: whether each row's prompt is fed but for its last token.
        contexts: tokens of each row so far.
        draft_pending: tokens that the draft must be fed before it can propose for each row.
        target_tokens: packed tokens of the verification without any candidate.
        free_trimming: whether a candidate may be trimmed by its own score: matching modes only.
    """

    rows: Sequence[RowMemory]
    room: Sequence[int]
    decoding: Sequence[bool]
    contexts: Sequence[int]
    draft_pending: Sequence[int]
    target_tokens: int
    free_trimming: bool


@dataclass(frozen=True, slots=True)
class DraftStep:
    """The candidates just drawn, one for each of n rows.

    Attributes:
        rows: int [n], index of each row among the round's rows.
        depth: how many candidates these rows have now.
        signals: float [n, len(Signal)]; columns that the policy does not want are 0.
    """

    rows: Indices
    depth: int
    signals: Array


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What became of a round, per row (host numbers).

    Attributes:
        start: as it began.
        drafted, submitted, accepted: candidates per row.
        draft_costs: (packed tokens, seconds) of each draft step.
        verify_cost: (packed target tokens, seconds of the rest of the round).
    """

    start: RoundStart
    drafted: Sequence[int]
    submitted: Sequence[int]
    accepted: Sequence[int]
    draft_costs: Sequence[tuple[int, float]]
    verify_cost: tuple[int, float]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a row's round went as it did, for `specbatch explain`.

    Attributes:
        predicted: estimated acceptance of each candidate, if the policy estimates it.
        reason: one sentence.
    """

    predicted: tuple[float, ...]
    reason: str


class StopPolicy:
    """Drafts nothing and remembers nothing: the base, and the policy `none`.

    Attributes:
        wanted: signals to compute for `go_on`; empty: `go_on` is not asked.
        head: the acceptance head behind the head's signals.
    """

    wanted: frozenset[Signal] = frozenset()
    head: AcceptanceHead | None = None

    def prepare(self, target: PackedDecoder, draft: PackedDecoder, slots: int) -> None:
        """Called once before the first round, with the models that will be run."""

    def budget(self, start: RoundStart) -> Sequence[int]:
        """At most how many candidates to draft for each row in this round."""
        return [0] * len(start.rows)

    def go_on(self, step: DraftStep) -> Flags:
        """bool [n]: which rows draft on."""
        return np.ones(len(step.rows), dtype=bool)

    def submit(self, drafted: Sequence[int]) -> Sequence[int]:
        """How many of each row's drafted candidates to submit; mind the invariant above."""
        return drafted

    def observe(self, outcome: RoundOutcome) -> None:
        """Learn from a finished round."""

    def costs_table(self) -> dict[str, list[tuple[int, float]]]:
        """Measured seconds by packed tokens, `draft` and `verify`, if the policy knows them."""
        return {}

    @property
    def fell_back(self) -> bool:
        """Whether a trained head was found out of calibration and is no longer believed."""
        return False

    def explain(self, row: int) -> Explanation:
        """Why the round just drafted stopped where it did, for one of its rows."""
        return Explanation((), type(self).__name__.lower())


@dataclass
class Fixed(StopPolicy):
    """Always k candidates."""

    k: int = 4

    def budget(self, start: RoundStart) -> Sequence[int]:
        return [self.k] * len(start.rows)


@dataclass
class Heuristic(StopPolicy):
    """Hugging Face's schedule, per row: k grows by 2 after a full acceptance, else shrinks by 1."""

    k: int = 4
    k_min: int = 1
    k_max: int = 20

    def budget(self, start: RoundStart) -> Sequence[int]:
        return [row.k or self.k for row in start.rows]

    def observe(self, outcome: RoundOutcome) -> None:
        for row, submitted, accepted in zip(
            outcome.start.rows, outcome.submitted, outcome.accepted, strict=True
        ):
            if submitted:
                k = (row.k or self.k) + (2 if accepted == submitted else -1)
                row.k = min(max(k, self.k_min), self.k_max)


@dataclass
class Confidence(StopPolicy):
    """Hugging Face's assisted generation: stop after a candidate less likely than `threshold`.

    The likelihood is the draft's own, before temperature, so that it also means something when
    greedy. The unlikely candidate itself is still submitted.
    """

    threshold: float = 0.4
    k_max: int = 20
    wanted = frozenset({Signal.LOG_Q})

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

    threshold: float = 0.4
    k_max: int = 20
    wanted = frozenset({Signal.ENTROPY})

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


class EstimatingPolicy(StopPolicy):
    """A policy with an estimator: keeps each row's survival and teaches the estimator.

    The survival of a row is the estimated probability that all its candidates so far are accepted.

    Args:
        estimator: acceptance probabilities from signals.
        head: the module behind the head's signals.
    """

    PRIOR_RATE, PRIOR_WEIGHT = 0.6, 8.0
    """Acceptance rate before anything was judged, and how many candidates that is worth."""

    FORGET = 0.998
    """Weight that is left of the pair's old evidence after one more candidate."""

    def __init__(self, estimator: Estimator, head: AcceptanceHead | None = None) -> None:
        self.estimator, self.head, self.wanted = estimator, head, estimator.wanted
        self._judged, self._accepted = self.PRIOR_WEIGHT, self.PRIOR_WEIGHT * self.PRIOR_RATE
        self._steps: list[_Judgement] = []

    @property
    def fell_back(self) -> bool:
        return isinstance(self.estimator, HeadEstimator) and self.estimator.fallen_back

    def _begin(self, start: RoundStart) -> None:
        """Start a round: nothing drafted, all rows alive."""
        self._steps = []
        weight, known = self.PRIOR_WEIGHT, self.PRIOR_WEIGHT * self._accepted / self._judged
        rates = [(r.history.accepted + known) / (r.history.judged + weight) for r in start.rows]
        self.typical = [min(max(rate, 0.02), 0.98) for rate in rates]
        self.survival = [1.0] * len(rates)

    def _judge(self, step: DraftStep) -> _Judgement:
        """Estimate the candidates just drawn and take them into the rows' survival."""
        rows: list[int] = step.rows.tolist()
        typical = np.array([self.typical[row] for row in rows])
        before, after = (p.tolist() for p in self.estimator.predict(step.signals, typical))
        for row, p in zip(rows, after, strict=True):
            self.survival[row] *= p
        survival = [self.survival[row] for row in rows]
        judged = _Judgement(rows, step.signals, before, after, survival)
        self._steps.append(judged)
        return judged

    def observe(self, outcome: RoundOutcome) -> None:
        if not self._steps:
            return
        start, steps, self._steps = outcome.start, self._steps, []
        # Up to a row's first rejected candidate all were judged; what comes after it was not.
        each = zip(outcome.accepted, outcome.submitted, strict=True)
        judged = [min(accepted + 1, submitted) for accepted, submitted in each]
        # A candidate that was not submitted, behind accepted ones, counts as what it was taken for:
        # those dropped are the unlikely ones, and without them a row's rate would be too high.
        dropped: dict[int, float] = {}
        # In plain Python: an array operation takes longer after a forward than all of this.
        known, rows, stood, at = [], [], [], 0
        for depth, step in enumerate(steps):
            for row, predicted in zip(step.rows, step.after, strict=True):
                if depth < judged[row]:
                    stands = depth < outcome.accepted[row]
                    start.rows[row].judged.append((start.contexts[row], predicted, stands))
                    known.append(at)
                    rows.append(row)
                    stood.append(stands)
                elif depth == outcome.submitted[row] == outcome.accepted[row]:
                    dropped[row] = predicted
                at += 1
        for i, memory in enumerate(start.rows):
            if judged[i] or i in dropped:
                accepted = outcome.accepted[i] + dropped.get(i, 0.0)
                memory.history.add(judged[i] + (i in dropped), accepted)
        reached = sum(judged) + len(dropped)
        kept = self.FORGET**reached
        self._judged = self._judged * kept + reached
        self._accepted = self._accepted * kept + sum(stood) + sum(dropped.values())
        if known:
            signals = np.concatenate([step.signals for step in steps])[known]
            typical = np.array([self.typical[row] for row in rows])
            self.estimator.learn(signals, typical, np.array(stood))

    def explain(self, row: int) -> Explanation:
        predicted = tuple(
            p
            for step in self._steps
            for p, owner in zip(step.after, step.rows, strict=True)
            if owner == row
        )
        return Explanation(predicted, self._reason(row, len(predicted)))

    def _reason(self, row: int, drafted: int) -> str:
        raise NotImplementedError


class HeadPolicy(EstimatingPolicy):
    """SpecDec++ (arXiv 2405.19715): stop once P(some candidate is rejected) exceeds `threshold`.

    Args:
        estimator, head: as published a trained head; any estimator will do.
        threshold: h, on 1 - prod p. The optimal stop is a threshold (theorem 3.1 there), at
            (c2 + d) / (c1 + c2 + d) for costs c1 of a draft step and c2 of the rest of a round.
        k_min, k_max: least and most candidates.
    """

    def __init__(
        self,
        estimator: Estimator,
        head: AcceptanceHead | None = None,
        threshold: float = 0.7,
        k_min: int = 2,
        k_max: int = 20,
    ) -> None:
        super().__init__(estimator, head)
        self.threshold, self.k_min, self.k_max = threshold, k_min, k_max

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


def context_class(tokens: int) -> int:
    """The power of two that a context length falls under, at least 128: a class for reports."""
    return max(128, 1 << (max(tokens, 1) - 1).bit_length())
