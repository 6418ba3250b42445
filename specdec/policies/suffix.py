"""The policy `suffix`: candidates that were looked up, by a fixed rule, without a draft model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.policies.base import MOST_CANDIDATES, Chain, RoundStart
from specdec.policies.estimating import EstimatingPolicy
from specdec.policies.estimators import Estimator, lookup_estimator
from specdec.policies.settings import setting


@dataclass(eq=False)
class Suffix(EstimatingPolicy):
    """Submit what was looked up as long as all of it together is likely enough to stand.

    `goodput` without a draft weighs the same candidates against what they cost.
    """

    name = "suffix"
    summary = "takes without a draft what followed the same tokens before, if it is likely to stand"
    estimates = False
    drafts = False
    looks_up = True

    estimator: Estimator = field(default_factory=lookup_estimator)
    threshold: float = setting(0.5, 0, 1, "submit no chain that stands with less probability")
    k_max: int = setting(20, 1, MOST_CANDIDATES, "most candidates of a round")

    def choose(self, start: RoundStart, chains: Sequence[Chain]) -> Sequence[int]:
        self._begin(start)
        self._judge_chains(chains)
        counts = [0] * len(chains)
        for step in self._steps:
            for row, survival in zip(step.rows, step.survival, strict=True):
                counts[row] += survival >= self.threshold
        return counts

    def _reason(self, row: int, drafted: int) -> str:
        if not drafted:
            return "nothing that was written before goes on from here"
        return f"all {drafted} stand with probability {self.survival[row]:.2f}"
