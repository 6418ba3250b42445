"""Trees under measured costs: which children are kept, expanded and verified, and what is learnt.

The objective is that of chains (specdec/policies/objective.py): expected tokens, less what the time
is worth. A node's expected tokens are its survival, the product of the estimates along its path.
It falls from a parent to its children and from a child to its worse siblings. So the likeliest
nodes of all rows, however many, are trees again.

    keep    a child takes a place of the verification if it is worth one
    expand  another level takes a draft step, which all nodes that are expanded share
    prune   where nodes may be dropped by what they are, the best set of all

One thing is new. A draft step later there are likelier nodes perhaps, and a verification has room
for so many tokens before it takes longer. What a place is worth in the end, the `floor`, is learnt
from what was worth verifying in the last rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.measure.calibration import Array, Flags
from specdec.policies.base import (
    MOST_CANDIDATES,
    DraftStep,
    Explanation,
    Indices,
    RoundOutcome,
    RoundStart,
)
from specdec.policies.catch_up import shared
from specdec.policies.costs import CostModel
from specdec.policies.estimating import EstimatingPolicy
from specdec.policies.forest import NONE, Children, Forest
from specdec.policies.kinds import Kind, Kinds, expected
from specdec.policies.objective import best_number, best_tree, further_seconds, leading_rows
from specdec.policies.siblings import SEEN, sibling_estimator
from specdec.policies.simple import leaving_once

SLACK = 0.5
"""Part of the floor that a node must be worth to be kept at first, where it may be dropped later.

Raised, what turns out to be worth verifying is missing now and then; lowered, a row's tree is full
sooner.
"""

FIRST_FLOOR = 0.02
"""The floor before any tree was verified. Between what one row and 64 had; it lasts one round."""

MOST_OF_SECOND = 0.15
"""Tokens that a place in the verification may cost where trees are tried.

A second child is worth a tenth of a token in the mean. By an H200's costs a place takes 0.10 at 16
rows, where trees gain 4%, and 0.18 at 64, where they gain half a percent. Raised, trees are tried
in batches too large for them.
"""

FOLLOW = 0.9
"""Weight that is left of the floor after one more round of trees.

Raised, the floor is steadier and follows the batch later. Set by hand.
"""

SHAPED = 2
"""Children of first choices where trees have one shape, as of `fixed`.

Raised, more of the verification goes to third choices, which seldom stand.
"""

SECOND_RATE = 0.4
"""How often one of the others stands where a first child fell, before anything was judged.

Raised, the first trees are deeper. It soon fades.
"""

_Furthers = tuple[bool, tuple[int, int, float, float]]
"""What `further_seconds` depends on: whether the round is looked at, and its other arguments."""


class GrowingPolicy(EstimatingPolicy):
    """An estimating policy whose candidates may be trees.

    Attributes:
        costs, price, k_max: as of `Goodput`, whose part this is.
        siblings: judges children behind better ones.
        forest: the trees of the round, if it has any.
        kinds: which kind of rounds is the fastest.
        floor: tokens that a place of the verification is worth, at least.
    """

    costs: CostModel | None
    k_max: int
    price: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.siblings = sibling_estimator()
        self.forest: Forest | None = None
        self._shaped = False  # whether the round's trees have one shape, since nobody looks
        self.kinds = Kinds()
        self.floor, self._rounds = FIRST_FLOOR, 0.0
        # First children that fell lately, and of how many of them a sibling stood; second children
        # that were judged, and how many stood.
        self._fallen, self._caught = self.PRIOR_WEIGHT, self.PRIOR_WEIGHT * SECOND_RATE
        self._seconds, self._stood = self._fallen, self._caught
        # Packed tokens of the verification: without any candidate, and as it is now.
        self._tokens_bare = self._tokens_fed = 0
        # `further_seconds` of the cost tables as they are, by its arguments.
        self._furthers: dict[_Furthers, Sequence[Sequence[float]] | Array] = {}

    @property
    def branches(self) -> bool:
        return self.forest is not None

    @property
    def most(self) -> int:
        return MOST_CANDIDATES if self.grows else super().most

    def _plant(self, start: RoundStart | None, looks: bool = True) -> None:
        """Begin the trees of a round; None: it has none."""
        self.wanted, self.forest, self._shaped = self.estimator.wanted, None, not looks
        if start is not None:
            self.wanted |= SEEN
            self.forest = Forest(self.typical, start.nodes, start.free_trimming)
            start.notes["forest"] = self.forest

    def _possible(self, start: RoundStart, known: bool) -> list[Kind]:
        """The kinds that a round may be of; `known`: it has candidates that nobody drew."""
        trees = (False, True) if not known and self._may_branch(start) else (False,)
        looking = (True, False) if start.beside else (True,)
        return [Kind(looks, branches) for branches in trees for looks in looking]

    def _may_branch(self, start: RoundStart) -> bool:
        """Whether trees are possible in a round, and siblings may repay their places in it."""
        assert self.costs is not None
        if not self.grows or not start.nodes:
            return False
        rows, bare = len(start.rows), self._tokens_bare
        seconds = float(self.costs.verify(bare + rows) - self.costs.verify(bare)) / rows
        return self.price * seconds < MOST_OF_SECOND

    @property
    def passing(self) -> list[float]:
        """How often some child of an accepted node is accepted, by row."""
        caught = self._caught / self._fallen
        return [rate + (1 - rate) * caught for rate in self.typical]

    def _shape(self, rows: Sequence[int]) -> tuple[int, float]:
        """`best_tree` for some rows, as the costs and the round's price are."""
        assert self.costs is not None
        first = float(np.mean([self.typical[row] for row in rows]))
        rates = first, self._stood / self._seconds
        given = self.costs, self._tokens_bare, len(rows), rates
        return best_tree(*given, self.price, self.k_max)

    def _leading(
        self,
        rates: Sequence[float] | Array,
        expected: Sequence[float] | Array,
        first: Sequence[float] | Array,
        left: int,
        share: float = 1.0,
        floor: float = 0.0,
    ) -> tuple[int, int, float]:
        """`leading_rows`, or nodes, at the round's price and the costs as they are."""
        assert self.costs is not None
        given = self._tokens_fed, len(rates), share, floor
        if (key := (self.looks, given)) not in self._furthers:
            self._furthers[key] = further_seconds(self.costs, *given)
        return leading_rows(rates, expected, first, self._furthers[key], self.price, left)

    def _compare(self, outcome: RoundOutcome, kind: Kind, spent: float) -> None:
        """Note what a round was expected to yield, and took, for the choice of the next ones.

        Left out are rounds that mostly read prompts.
        """
        assert self.costs is not None
        seconds = shared(spent, outcome, self.costs.draft)
        if seconds > spent / 2:
            rows = len(outcome.start.rows)
            came = rows + sum(outcome.accepted)
            self.kinds.ended(rows, kind, rows + expected(outcome), seconds, came)

    # ---------------------------------------------------------------- decisions

    def keep(self, step: DraftStep) -> Flags:
        assert self.costs is not None and self.forest is not None
        if self._shaped:
            return leaving_once(step, SHAPED)
        forest = self.forest
        children = forest.judge(step, self.estimator, self.siblings)
        if forest.free:  # `prune` chooses, when all are drawn
            order = forest.fitting(np.flatnonzero(children.worth >= SLACK * self.floor))
            self._tokens_fed += int((children.worth[order] >= self.floor).sum())
            return forest.keep(order)
        # Rank by rank: whether a child is kept may depend on its better siblings only.
        kept, next_best = children.ranks[:0], np.flatnonzero(children.ranks == 0)
        while len(next_best):
            order = forest.fitting(next_best, kept)
            fed = self._tokens_fed + len(kept)
            seconds = self.costs.verify.curve(fed, fed + len(order))
            number = best_number(children.worth[order], seconds, self.price, self.floor)
            kept = np.concatenate([kept, order[:number]])
            next_best = children.behind(order[:number])
        self._tokens_fed += len(kept)
        return forest.keep(kept)

    def _expand(self, step: DraftStep) -> Flags:
        """Which of the children just drawn are expanded."""
        assert self.costs is not None and self.forest is not None
        if self._shaped:
            return np.ones(len(step.rows), dtype=bool)
        depth = step.depth
        children, floor = self.forest.steps[-1], self.floor
        going, left = np.zeros(len(children.rows), dtype=bool), self.k_max - depth
        # A place for its first child must be worth it. The others count, and pay for themselves.
        worth = children.survival * children.typical >= floor
        nodes = np.flatnonzero(worth & (children.nodes != NONE))
        if not left or not len(nodes):
            return going
        nodes = nodes[np.argsort(-children.survival[nodes], kind="stable")]
        rates = np.array(self.passing)[children.rows[nodes]]
        expected = children.survival[nodes] * rates
        next_step = self.costs.draft.curve(1, len(nodes))
        n, _, gain = self._leading(rates, expected, next_step, left, floor=floor / self.price)
        if gain > 0:
            going[nodes[:n]] = True
        return going

    def prune(self, parents: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        assert self.costs is not None and self.forest is not None
        if self._shaped:
            return [range(len(each)) for each in parents]
        _, _, worth = self.forest.drawn()
        number = self._worth_verifying(worth)
        least = float(worth[number - 1]) if 0 < number < len(worth) else 0.0
        least = max(least, self.forest.crowding())
        self._rounds = FOLLOW * self._rounds + 1
        self.floor += (least - self.floor) / self._rounds
        if not self.forest.free:
            return [range(len(each)) for each in parents]
        rows, nodes, worth = self.forest.drawn(nodes_only=True)
        number = self._worth_verifying(worth)
        rows, nodes = rows[:number], nodes[:number]
        return [sorted(nodes[rows == row].tolist()) for row in range(len(parents))]

    def _worth_verifying(self, worth: Array) -> int:
        """How many of the likeliest nodes, of such worth, are worth verifying."""
        assert self.costs is not None
        bare = self._tokens_bare
        return best_number(worth, self.costs.verify.curve(bare, bare + len(worth)), self.price)

    def explain(self, row: int) -> Explanation:
        if self.forest is None or not self.forest.steps:
            return super().explain(row)
        chances = self.forest.chances(row)
        reason = (
            f"{len(chances)} nodes: no other is worth {self.floor:.3f} tokens and its part of a "
            f"draft step, at {self.price:.0f} tokens/s"
        )
        return Explanation(tuple(chances), reason)

    # ---------------------------------------------------------------- learning

    def observe(self, outcome: RoundOutcome) -> None:
        if outcome.path:
            forest = outcome.start.notes["forest"]
            for step in outcome.unseen():
                forest.judge(step, self.estimator, self.siblings)
                forest.keep(forest.within(leaving_once(step, SHAPED)))
            self._learn(forest, outcome)
        else:
            super().observe(outcome)

    def _learn(self, forest: Forest, outcome: RoundOutcome) -> None:
        """Take in what became of a round's trees.

        Judged are the submitted children of accepted nodes, up to the one of each that stands.
        """
        memories, contexts = outcome.start.rows, outcome.start.contexts
        stood = [set(path) for path in outcome.path]
        submitted = [set(kept) for kept in outcome.kept]
        accepted_nodes = forest.flags(outcome.path)
        judged, accepted = [0.0] * len(stood), [0.0] * len(stood)
        firsts = dropped = 0.0
        for children in forest.steps:
            known, stands = list[int](), list[bool]()
            places = np.flatnonzero(accepted_nodes[children.rows, children.parents])
            columns = ("rows", "parents", "ranks", "nodes", "chances")
            each = (getattr(children, name)[places].tolist() for name in columns)
            decided = False  # by a better sibling, which stands or was not submitted
            for at, row, parent, rank, node, chance in zip(places.tolist(), *each, strict=True):
                decided = decided and rank > 0
                if decided:
                    continue
                if node not in submitted[row]:
                    # Those dropped are the unlikely ones: they count as what they were taken for.
                    if rank == 0 and parent == (outcome.path[row] or [NONE])[-1]:
                        judged[row], accepted[row] = judged[row] + 1, accepted[row] + chance
                        dropped += chance
                    decided = True
                    continue
                decided = node in stood[row]
                known.append(at)
                stands.append(decided)
                memories[row].judged.append((contexts[row], chance, decided))
                if rank == 0:
                    judged[row], accepted[row] = judged[row] + 1, accepted[row] + decided
                    firsts += decided
                    self._count_fallen(not decided)
                    continue
                self._caught += decided
                if rank == 1:
                    self._seconds = self.FORGET * self._seconds + 1
                    self._stood = self.FORGET * self._stood + decided
            if known:
                self._teach(children, np.array(known), np.array(stands))
        for memory, tried, hits in zip(memories, judged, accepted, strict=True):
            if tried:
                memory.history.add(tried, hits)
        reached = sum(judged)
        kept = self.FORGET**reached
        self._judged = self._judged * kept + reached
        self._accepted = self._accepted * kept + firsts + dropped

    def _count_fallen(self, fell: bool) -> None:
        if fell:
            self._fallen = self.FORGET * self._fallen + 1
            self._caught *= self.FORGET

    def _teach(self, children: Children, known: Indices, stands: Flags) -> None:
        first = children.ranks[known] == 0
        for best, estimator, seen in (
            (first, self.estimator, children.signals),
            (~first, self.siblings, children.evidence),
        ):
            if best.any():
                at = known[best]
                estimator.learn(seen[at], children.typical[at], stands[best])
