"""What rounds' forwards took, collected until there is enough for cost tables to learn from."""

from __future__ import annotations

from collections.abc import Callable

from specdec.policies.base import RoundOutcome
from specdec.policies.costs import CostModel

TOGETHER = 16
"""Measurements that are collected before the cost tables learn from them.

Each update takes array operations of some 20 µs, and the tables of `further_seconds` anew. Raised,
costs follow a change of the machine later.
"""


class Measurements:
    """Seconds since the cost tables learnt last, by what learns them and by tokens."""

    def __init__(self) -> None:
        self._taken: dict[tuple[Callable[..., None], int], list[float]] = {}

    def note(self, costs: CostModel, outcome: RoundOutcome, whole: float | None = None) -> None:
        """Note what a round's forwards took.

        Args:
            costs: learn from it, later.
            outcome: of the round.
            whole: seconds of the round, where it is not known which part of it took how long: the
                host launched all of them and then waited. Each has its expected share.
        """
        draft, verify = costs.observe_draft, costs.observe_verify
        parts = [(draft, *step) for step in outcome.draft_costs] + [(verify, *outcome.verify_cost)]
        if whole is not None:
            steps = [(draft, n, float(costs.draft(n))) for _, n, _ in parts[:-1]]
            tokens = outcome.verify_cost[0]
            parts = [*steps, (verify, tokens, float(costs.verify(tokens)))]
            slower = whole / sum(seconds for *_, seconds in parts)
            parts = [(learn, n, slower * seconds) for learn, n, seconds in parts]
        for learn, tokens, seconds in parts:
            self._taken.setdefault((learn, tokens), []).append(seconds)

    def teach(self) -> bool:
        """Let the tables learn, if there is enough to learn from: whether they did."""
        if sum(map(len, self._taken.values())) < TOGETHER:
            return False
        for (learn, tokens), seconds in self._taken.items():
            learn(tokens, *seconds)
        self._taken = {}
        return True
