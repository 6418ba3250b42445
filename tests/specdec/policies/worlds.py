"""Pairs with known acceptance and costs, in which `goodput` decides round after round."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from specdec.policies.base import DraftStep, Signal
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.estimators import Estimator, online_estimator
from specdec.policies.goodput import Goodput
from specdec.policies.memory import RowMemory
from tests.specdec.workloads import (
    Known,
    StatedGoodput,
    draft_step,
    linear,
    memories,
    outcome,
    round_start,
)

FREE = CostTable([1, 4096], [1e-9, 1e-9])
"""A draft that costs nothing."""


def policy_of(
    draft: CostTable, verify: CostTable, k_max: int = 8, estimator: Estimator | None = None
) -> StatedGoodput:
    return StatedGoodput(estimator or Known(), None, CostModel(draft, verify), k_max)


def drafted(
    policy: StatedGoodput,
    after: Sequence[Sequence[float]],
    *,
    free_trimming: bool = True,
    before: Sequence[Sequence[float]] | None = None,
) -> list[int]:
    """Start a round and judge candidates, the rows that speculate to the same depth.

    Args:
        after: by depth, the probability of each row's candidate once it is drawn.
        before: the same before it is drawn.

    Returns:
        How many candidates each row has.
    """
    rows = len(after[0])
    budget = policy.budget(round_start(memories(rows), free_trimming=free_trimming))
    active = np.flatnonzero(budget)
    for depth, (known, drawn) in enumerate(zip(before or after, after, strict=True), start=1):
        columns = {
            Signal.HEAD_BEFORE: np.array(known)[active],
            Signal.HEAD_AFTER: np.array(drawn)[active],
        }
        policy.go_on(draft_step(active.tolist(), depth, columns))
    return [len(after) * (row in active) for row in range(rows)]


CHEAP, COSTLY = linear(0.05, 0.001), linear(1.0, 0.01)
"""A draft that costs a twentieth of the target, and one that costs the same."""
FLAT, STEEP = linear(1.0, 0.01), linear(0.01, 1.0)
"""A target whose tokens ride along, and one that pays for each."""


@dataclass
class World:
    """A pair whose candidates are accepted with a probability per row, at stated costs.

    Attributes:
        policy: decides; rates: acceptance per row; the draft knows nothing about a candidate.
        host: beside a device, seconds more that a draft step takes which the policy looks at.
        prompt: tokens of prompts that the last row feeds in each round, if any; it never decodes.
        drafted, verified, accepted, seconds, committed, draft_seconds: per round (the first three:
            per row as well).
    """

    policy: Goodput
    rates: Sequence[float]
    free_trimming: bool = True
    seed: int = 0
    host: float = 0.0
    prompt: int = 0
    drafted: list[list[int]] = field(default_factory=list)
    verified: list[list[int]] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows: list[RowMemory] = memories(len(self.rates))
        self.random = np.random.default_rng(self.seed)
        self.costs = copy.deepcopy(self.policy.costs)

    def run(self, rounds: int) -> World:
        for _ in range(rounds):
            self._round()
        return self

    def _round(self) -> None:
        policy, n = self.policy, len(self.rows)
        start = round_start(self.rows, free_trimming=self.free_trimming, beside=self.host > 0)
        if self.prompt:
            room, decoding = [*start.room[:-1], 0], [*start.decoding[:-1], False]
            fed = n - 1 + self.prompt
            start = replace(start, room=room, decoding=decoding, target_tokens=fed)
        budget = list(policy.budget(start))
        counts, stands = [0] * n, [0] * n
        active = [row for row in range(n) if budget[row]]
        alive = [True] * n
        depth, steps = 0, list[DraftStep]()
        while active:
            depth += 1
            for row in active:
                counts[row] += 1
                alive[row] = alive[row] and self.random.random() < self.rates[row]
                stands[row] += alive[row]
            known = {Signal.LOG_Q: [-0.5] * len(active), Signal.LOG_TOP: [-0.5] * len(active)}
            steps.append(draft_step(active, depth, known))
            flags = policy.go_on(steps[-1]).tolist() if policy.looks else [True] * len(active)
            active = [r for r, on in zip(active, flags, strict=True) if on and budget[r] > depth]
        submitted = list(policy.submit(counts) if any(counts) else counts)
        accepted = [min(k, s) for k, s in zip(submitted, stands, strict=True)]
        this = outcome(start, counts, accepted, submitted, self.costs)
        if policy.looks:
            told = [(n, seconds + self.host) for n, seconds in this.draft_costs]
            this = replace(this, draft_costs=told)
        else:
            this = replace(this, unseen=lambda: steps)
        policy.observe(this)
        self.drafted.append(counts)
        self.verified.append(submitted)
        self.accepted.append(accepted)
        self.seconds.append(this.verify_cost[1] + sum(s for _, s in this.draft_costs))

    def goodput(self, last: int) -> float:
        """Committed tokens per second of the last rounds."""
        tokens = sum(sum(each) + len(self.rates) for each in self.accepted[-last:])
        return tokens / sum(self.seconds[-last:])

    def speculating(self, last: int) -> float:
        """Share of the last rounds with candidates."""
        return float(np.mean([any(each) for each in self.drafted[-last:]]))


def world(
    rates: Sequence[float], draft: CostTable, verify: CostTable, *, free_trimming: bool = True
) -> World:
    policy = policy_of(draft, verify, 12, online_estimator("confidence"))
    return World(policy, rates, free_trimming)


def best_fixed(
    rate: float, rows: int, draft: CostTable, verify: CostTable, ks: Sequence[int] = range(13)
) -> float:
    """Tokens per second of the best fixed K of some, by the law of large numbers."""
    return max(
        rows
        * sum(rate**i for i in range(k + 1))
        / (k * float(draft(rows)) + float(verify(rows * (k + 1))))
        for k in ks
    )
