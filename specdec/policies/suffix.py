"""The policy `suffix`: candidates that were looked up, by a fixed rule, without a draft model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.policies.base import MOST_CANDIDATES, Explanation, RoundOutcome, RoundStart, StopPolicy
from specdec.policies.chains import Chain
from specdec.policies.known import KnownChains, survivals
from specdec.policies.settings import setting


@dataclass(eq=False)
class Suffix(StopPolicy):
    """Submit what was looked up as long as all of it together is likely enough to stand.

    `goodput` weighs the same candidates against what they cost.
    """

    name = "suffix"
    summary = "takes without a draft what followed the same tokens before, if it is likely to stand"
    drafts = False
    looks_up = True
    learns_late = True

    threshold: float = setting(0.5, 0, 1, "submit no chain that stands with less probability")
    k_max: int = setting(20, 1, MOST_CANDIDATES, "most candidates of a round")

    def __post_init__(self) -> None:
        self.found = KnownChains()
        self._predicted: Sequence[Sequence[float]] = ()

    def choose(self, start: RoundStart, chains: Sequence[Chain]) -> Sequence[int]:
        self._predicted = self.found.predict(start, chains)
        return [
            max(sum(p >= self.threshold for p in survivals(predicted)), chain.forced)
            for chain, predicted in zip(chains, self._predicted, strict=True)
        ]

    def observe(self, outcome: RoundOutcome) -> None:
        self.found.observe(outcome)

    def explain(self, row: int) -> Explanation:
        predicted = self._predicted[row]
        if not predicted:
            return Explanation((), "nothing that was written before goes on from here")
        said = f"all {len(predicted)} stand with probability {survivals(predicted)[-1]:.2f}"
        return Explanation((), said, (*predicted,))
