"""Replaying stop policies on recorded traces under any costs.

The policies are the real ones: they are driven through `StopPolicy` as the engine drives them, on a
virtual clock that a `CostModel` advances. What a policy would do on this machine, on another, or at
another live batch takes seconds to find out.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from specdec.acceptance import Array, Flags
from specdec.costs import CostModel
from specdec.request import Counts
from specdec.stopping import DraftStep, RoundOutcome, RoundStart, RowMemory, StopPolicy

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Trace:
    """One text of n tokens and what a draft proposed along it (specdec/tracing.py).

    Attributes:
        context: tokens of its prompt.
        accepted: bool [n], whether the candidate for position t, drawn on x_<t, is the text's.
        signals: float32 [n, S], of these candidates.
        branches: float32 [n, K, S], where a candidate is wrong: signals of the K after it.
        chances: float32 [n, 2], p and q of each candidate.
    """

    context: int
    accepted: Flags
    signals: Floats
    branches: Floats
    chances: Floats

    def runs(self) -> NDArray[np.int64]:
        """int64 [n + 1]: how many candidates in a row would be accepted from each position on."""
        runs = np.zeros(len(self.accepted) + 1, dtype=np.int64)
        for t in range(len(self.accepted) - 1, -1, -1):
            runs[t] = runs[t + 1] + 1 if self.accepted[t] else 0
        return runs


def save_traces(path: Path, traces: Sequence[Trace]) -> None:
    """Write traces to one safetensors file."""
    tensors = {}
    for i, trace in enumerate(traces):
        tensors[f"{i}.context"] = np.array([trace.context])
        for name in ("accepted", "signals", "branches", "chances"):
            tensors[f"{i}.{name}"] = getattr(trace, name)
    save_file(tensors, path)


def load_traces(path: Path) -> list[Trace]:
    """What `save_traces` wrote."""
    tensors = load_file(path)
    return [
        Trace(
            int(tensors[f"{i}.context"][0]),
            *(tensors[f"{i}.{name}"] for name in ("accepted", "signals", "branches", "chances")),
        )
        for i in range(len(tensors) // 5)
    ]


@dataclass
class Replay:
    """What a policy did.

    Attributes:
        counts: summed over rows.
        seconds: of all rounds.
        row_seconds: seconds of the rounds that each trace took part in, in order of the traces;
            at live batch 1 they sum to `seconds`.
        rounds: target forwards.
    """

    counts: Counts = field(default_factory=Counts)
    seconds: float = 0.0
    row_seconds: list[float] = field(default_factory=list)
    rounds: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per second."""
        return self.counts.committed / self.seconds

    @property
    def verification_rate(self) -> float:
        """Target forwards per output token of a row."""
        return self.counts.rounds / self.counts.committed

    @property
    def discard_rate(self) -> float:
        """Drafted candidates that do not stand, per output token."""
        return (self.counts.drafted - self.counts.accepted) / self.counts.committed


@dataclass(slots=True)
class _Row:
    """A trace on its way: `at` is the next output position, `pending` what the draft lacks."""

    index: int
    trace: Trace
    runs: NDArray[np.int64]
    at: int = 0
    pending: int = 1
    memory: RowMemory = field(default_factory=RowMemory)

    @property
    def left(self) -> int:
        return len(self.trace.accepted) - self.at

    def signals(self, drafted: int) -> Floats:
        """What the draft signals for the candidate after `drafted` others of this round."""
        run = int(self.runs[self.at])
        wrong = drafted > run
        found: Floats = (
            self.trace.branches[self.at + run, drafted - run - 1]
            if wrong
            else self.trace.signals[self.at + drafted]
        )
        return found


def replay(
    traces: Sequence[Trace],
    policy: StopPolicy,
    costs: CostModel,
    *,
    slots: int = 1,
    free_trimming: bool = False,
) -> Replay:
    """Run all traces through a policy, `slots` at a time.

    Prompts are taken as fed: only decoding is simulated.

    Args:
        policy: changed in place, as it learns.
        costs: of the machine; a policy with costs of its own should be given a copy.
        slots: live batch, until the traces run out.
        free_trimming: as under matching verification.
    """
    waiting = deque(_Row(i, trace, trace.runs()) for i, trace in enumerate(traces))
    result = Replay(row_seconds=[0.0] * len(traces))
    live: list[_Row] = []
    while waiting or live:
        while waiting and len(live) < slots:
            live.append(waiting.popleft())
        spent = _round(live, policy, costs, free_trimming, result)
        result.seconds += spent
        result.rounds += 1
        for row in live:
            result.row_seconds[row.index] += spent
        live = [row for row in live if row.left > 0]
    return result


def _round(
    rows: Sequence[_Row],
    policy: StopPolicy,
    costs: CostModel,
    free_trimming: bool,
    result: Replay,
) -> float:
    """One round over the live rows; returns its seconds."""
    start = RoundStart(
        rows=[row.memory for row in rows],
        room=[min(row.left - 1, row.trace.branches.shape[1]) for row in rows],
        decoding=[True] * len(rows),
        contexts=[row.trace.context + row.at for row in rows],
        draft_pending=[row.pending for row in rows],
        target_tokens=len(rows),
        free_trimming=free_trimming,
    )
    budget = [min(k, room) for k, room in zip(policy.budget(start), start.room, strict=True)]
    drafted = [0] * len(rows)
    active = [i for i, k in enumerate(budget) if k > 0]
    draft_costs: list[tuple[int, float]] = []
    depth = 0
    while active:
        packed = sum(rows[i].pending for i in active) if depth == 0 else len(active)
        draft_costs.append((packed, float(costs.draft(packed))))
        signals = np.stack([rows[i].signals(depth) for i in active]).astype(np.float64)
        depth += 1
        for i in active:
            drafted[i] = depth
        within = [i for i in active if budget[i] > depth]
        if policy.wanted:
            flags = policy.go_on(DraftStep(np.array(active), depth, signals))
            going = {i for i, on in zip(active, flags, strict=True) if on}
            within = [i for i in within if i in going]
        active = within
    submitted = policy.submit(drafted) if any(drafted) else drafted

    accepted = []
    for row, k, sent in zip(rows, drafted, submitted, strict=True):
        stands = min(sent, int(row.runs[row.at]))
        accepted.append(stands)
        # The draft was fed all candidates but the last, and keeps those that stand.
        row.pending = stands + 1 - min(stands, k - 1) if k else row.pending + 1
        row.at += stands + 1
        result.counts.add(Counts(1, k, sent, stands, stands + 1))
    fed = len(rows) + sum(submitted)
    verify_cost = (fed, float(costs.verify(fed)))
    policy.observe(RoundOutcome(start, drafted, submitted, accepted, draft_costs, verify_cost))
    return verify_cost[1] + sum(seconds for _, seconds in draft_costs)


def clairvoyant_seconds(trace: Trace, costs: CostModel, k_max: int = 20) -> float:
    """Least seconds in which a text can be made at live batch 1 by one who knows what is accepted.

    Never drafts a candidate that is rejected, and cuts the accepted runs into rounds in the best
    way: a shortest path over positions. No policy can beat it under the same costs.
    """
    runs, n = trace.runs(), len(trace.accepted)
    best = np.full(n + 1, np.inf)
    best[n] = 0.0
    k = np.arange(k_max + 1)
    price: Array = k * float(costs.draft(1)) + costs.verify(k + 1)
    for t in range(n - 1, -1, -1):
        most = min(int(runs[t]), n - 1 - t, k_max)
        best[t] = float(np.min(price[: most + 1] + best[t + 1 : t + most + 2]))
    return float(best[0])


def copy_of(costs: CostModel) -> CostModel:
    """Costs that a policy may refine without changing the machine's."""
    return copy.deepcopy(costs)
