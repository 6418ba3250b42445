"""Grows the candidates of a round as a tree for each row, one level of all rows at a time.

A level takes one forward of the drafter over the *frontier*: the nodes that are expanded. Each of
them gets `width` children, of which the policy keeps the first few as nodes and says which of these
are the next frontier. So a level of any width costs the launches of one draft step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from torch import Tensor

from specdec.drafters.base import Candidates, Drafter, Drafting
from specdec.engine.grown import Frontier, GrownTrees
from specdec.engine.round import Round
from specdec.engine.seen import later, on_host
from specdec.engine.stats import EngineStats
from specdec.lossless.proposal import TreeProposal
from specdec.measure.calibration import Flags
from specdec.measure.clock import PhaseClock
from specdec.model.rows import upload
from specdec.model.sharing import SharedCaches
from specdec.model.trees import Tree
from specdec.policies.base import DraftStep, Indices, Signal, StopPolicy


class TreeLoop:
    """Asks a drafter for children, and a policy which to keep and where to go on.

    Args:
        drafter: proposes.
        policy: decides.
        clock: times it.
        stats: counts forwards.
    """

    def __init__(
        self, drafter: Drafter, policy: StopPolicy, clock: PhaseClock, stats: EngineStats
    ) -> None:
        self._drafter, self._policy, self._clock, self._stats = drafter, policy, clock, stats

    def run(self, this: Round, shared: SharedCaches, budget: Sequence[int]) -> None:
        """Fill the round's proposal with the nodes that the policy wants.

        Args:
            this: the round.
            shared: all caches.
            budget: how deep each row's tree may be.
        """
        active = [row for row, most in enumerate(budget) if most > 0 and this.start.nodes[row]]
        if not active:
            return
        device = self._drafter.cache.device
        grown = GrownTrees(
            TreeProposal(len(this.rows), max(this.start.nodes), device),
            {row: [] for row in active},
        )
        this.trees, this.proposal = grown, grown.proposal
        drafting = self._drafter.begin(this.rows, active, this.known, shared)
        frontier: Frontier = [(row, -1) for row in active]
        unseen: list[tuple[DraftStep, Tensor]] = []
        for depth in range(1, max(budget) + 1):
            with this.timer.apart() as lap:
                drawn = self._draw(this, drafting, frontier, depth)
                frontier = self._grow(this, drawn, frontier, budget, depth, unseen)
            this.draft_costs.append((sum(drawn.fed), lap.seconds))
            if not frontier:
                break
        if unseen:
            this.unseen = later(self._clock, unseen)
        grown.kept = self._policy.prune(grown.proposal.parents)
        this.proposal = grown.proposal.of(grown.kept)
        this.submitted = this.proposal.lengths

    def _draw(self, this: Round, drafting: Drafting, frontier: Frontier, depth: int) -> Candidates:
        """Children of the frontier's nodes, which lie at `depth`."""
        assert this.trees is not None
        proposal = this.trees.proposal
        rows = [row for row, _ in frontier]
        index, nodes = upload(self._drafter.cache.device, rows, [max(n, 0) for _, n in frontier])
        choose = this.branching(frontier, index, depth, self._policy)
        if depth == 1:
            drawn = drafting.step(choose)
        else:
            parents = this.trees.read(frontier)
            counts = [(row, len([*each])) for row, each in groupby(rows)]
            trees = [
                Tree(len(this.rows[row].tokens), own)
                for (row, _), own in zip(counts, parents, strict=True)
            ]
            tokens = proposal.candidates[index, nodes]
            drawn = drafting.branch(counts, tokens, trees, choose)
        self._stats.count_draft(drawn.fed)
        return drawn

    def _grow(
        self,
        this: Round,
        drawn: Candidates,
        frontier: Frontier,
        budget: Sequence[int],
        depth: int,
        unseen: list[tuple[DraftStep, Tensor]],
    ) -> Frontier:
        """Keep some of the children as nodes; return those that are expanded next."""
        assert this.trees is not None
        proposal, n, width = this.trees.proposal, len(frontier), drawn.tokens.shape[1]
        rows, parents = [row for row, _ in frontier], [node for _, node in frontier]
        # What stands in front of a row's own text would have to be told for each branch.
        alone = np.array([this.rows[row].grammar is not None for row in rows])
        asked = (np.arange(width) == 0) | ~alone[:, None]
        place, rank = np.nonzero(asked)
        signals = np.zeros((len(place), len(Signal)))
        step = DraftStep(np.array(rows)[place], depth, signals, np.array(parents)[place], rank)
        step = self._look(step, drawn, None if asked.all() else place * width + rank, unseen)
        with self._clock.phase({"decide": 1.0}):
            kept, going = np.zeros((2, n, width), dtype=bool)
            kept[asked] = self._policy.keep(step)
            kept = np.logical_and.accumulate(kept, 1)
            going[asked] = self._policy.go_on(step)
        counts = self._within(kept, rows, this)
        first = {row: proposal.lengths[row] for row in rows}
        proposal.grow(rows, parents, counts, drawn.tokens, drawn.q)
        if this.asked.masks is not None:
            # One child of each row: only chains are read, but all rows' nodes have a depth.
            chosen = dict[int, int]()
            for i in range(n):
                if counts[i]:
                    chosen.setdefault(rows[i], i)
            (at,) = upload(drawn.tokens.device, [*chosen.values()])
            this.asked.masks.follow([*chosen], drawn.tokens[at, 0])
        following: Frontier = []
        for (row, _), count, on in zip(frontier, counts, going, strict=True):
            room = budget[row] > depth and proposal.lengths[row] < this.start.nodes[row]
            following += [(row, first[row] + i) for i in range(count) if room and on[i]]
            first[row] += count
        return following

    def _look(
        self,
        step: DraftStep,
        drawn: Candidates,
        chosen: Indices | None,
        unseen: list[tuple[DraftStep, Tensor]],
    ) -> DraftStep:
        """The step with its signals, if the policy looks at them now."""
        if drawn.signals is None:
            return step
        signals = drawn.signals.flatten(0, 1)
        if chosen is not None:
            (at,) = upload(signals.device, chosen.tolist())
            signals = signals[at]
        if not self._policy.looks:
            unseen.append((step, signals.clone()))  # later steps overwrite what was recorded
            return step
        step.signals[:] = on_host(self._clock.fetch(signals)())
        return step

    @staticmethod
    def _within(kept: Flags, rows: Sequence[int], this: Round) -> list[int]:
        """How many children of each node are kept, as far as the rows' trees have room."""
        assert this.trees is not None
        lengths = this.trees.proposal.lengths
        left = {row: this.start.nodes[row] - lengths[row] for row in rows}
        counts: list[int] = []
        for row, wanted in zip(rows, kept.sum(1).tolist(), strict=True):
            counts.append(min(wanted, left[row]))
            left[row] -= counts[-1]
        return counts
