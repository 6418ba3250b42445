"""What policies that grow trees know of a round's nodes, and learn from what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.measure.calibration import Array, Flags
from specdec.policies.base import DraftStep, Indices, RoundOutcome, RoundStart
from specdec.policies.estimating import EstimatingPolicy
from specdec.policies.estimators import Estimator, OnlineEstimator
from specdec.policies.siblings import given_parent, sibling_estimator, sibling_evidence

NONE = -1
"""The number of a child that did not become a node."""


@dataclass(slots=True, eq=False)
class Children:
    """Children drawn in one draft step, as estimators saw them: arrays over n children.

    Attributes:
        rows, parents, ranks: as in `DraftStep`.
        typical: how often first children of each one's row are accepted.
        signals: of the step; evidence: float [n, len(Sibling)].
        chances: P(accepted | its parent is, and its better siblings are not), once it is drawn.
        reached: P(accepted), by what was known before it was drawn.
        survival: P(accepted), once it is drawn.
        nodes: the number of each as a node, or NONE.
    """

    rows: Indices
    parents: Indices
    ranks: Indices
    typical: Array
    signals: Array
    evidence: Array
    chances: Array
    reached: Array
    survival: Array
    nodes: Indices


class Forest:
    """The trees of a round's rows: all children that were drawn, and which of them are nodes.

    Attributes:
        steps: by depth.
        sizes: nodes of each row.
    """

    def __init__(self, typical: Sequence[float]) -> None:
        self.typical = np.array(typical)
        self.steps: list[Children] = []
        self.sizes = np.zeros(len(typical), dtype=np.int64)
        self._survival = np.ones((len(typical), 1))  # by row and node; the root last

    def judge(self, step: DraftStep, first: Estimator, others: OnlineEstimator) -> Children:
        """Estimate the children just drawn; none is a node yet."""
        assert step.parents is not None and step.ranks is not None, "a step of trees"
        rows, ranks = step.rows, step.ranks
        typical, evidence = self.typical[rows], sibling_evidence(step.signals, ranks)
        best = ranks == 0
        chances = np.empty((2, len(rows)))
        chances[:, best] = first.predict(step.signals[best], typical[best])
        if not best.all():
            chances[:, ~best] = others.predict(evidence[~best], typical[~best])
        behind = self._survival[rows, step.parents]
        before, after = chances
        children = Children(
            rows,
            step.parents,
            ranks,
            typical,
            step.signals,
            evidence,
            chances=after,
            reached=behind * given_parent(before, ranks),
            survival=behind * given_parent(after, ranks),
            nodes=np.full(len(rows), NONE),
        )
        self.steps.append(children)
        return children

    def keep(self, kept: Flags) -> None:
        """Make some of the children just drawn nodes, numbered in their order."""
        children = self.steps[-1]
        rows = children.rows[kept]
        # Rows come in blocks of one: the number within a block, behind the row's earlier nodes.
        counts = np.bincount(rows, minlength=len(self.sizes))
        first = np.cumsum(counts) - counts
        order = np.argsort(rows, kind="stable")
        within = np.empty(len(rows), dtype=np.int64)
        within[order] = np.arange(len(rows)) - first[rows[order]]
        numbers = self.sizes[rows] + within
        children.nodes[kept] = numbers
        self.sizes += counts
        most = int(self.sizes.max(initial=0))
        if (lacking := most + 1 - self._survival.shape[1]) > 0:
            # Whatever is not set yet, the root among it, stands at 1.
            self._survival = np.pad(self._survival, ((0, 0), (0, lacking)), constant_values=1.0)
        self._survival[rows, numbers] = children.survival[kept]

    def expected(self, kept: Sequence[Sequence[int]]) -> float:
        """How many of some nodes, by row, are expected to be accepted."""
        return sum(float(self._survival[row, [*nodes]].sum()) for row, nodes in enumerate(kept))


class GrowingPolicy(EstimatingPolicy):
    """An estimating policy whose candidates may be trees.

    Attributes:
        siblings: judges children behind better ones.
        forest: the trees of the round, where it grows any.
    """

    SECOND_RATE = 0.4
    """How often one of the others stands where a first child fell, before anything was judged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.siblings = sibling_estimator()
        self.forest: Forest | None = None
        # First children that fell lately, and of how many of them a sibling stood.
        self._fallen, self._caught = self.PRIOR_WEIGHT, self.PRIOR_WEIGHT * self.SECOND_RATE

    def _plant(self, start: RoundStart) -> None:
        """Begin the trees of a round."""
        self.forest = start.notes["forest"] = Forest(self.typical)

    @property
    def passing(self) -> list[float]:
        """How often some child of an accepted node is accepted, by row."""
        caught = self._caught / self._fallen
        return [rate + (1 - rate) * caught for rate in self.typical]

    def observe(self, outcome: RoundOutcome) -> None:
        forest: Forest | None = outcome.start.notes.get("forest")
        if forest is None:
            super().observe(outcome)
        elif outcome.path:
            self._learn(forest, outcome)

    def _learn(self, forest: Forest, outcome: RoundOutcome) -> None:
        """Take in what became of a round's trees.

        Judged are the submitted children of accepted nodes, up to the one of each that stands.
        """
        memories, contexts = outcome.start.rows, outcome.start.contexts
        stood = [set(path) for path in outcome.path]
        submitted = [set(kept) for kept in outcome.kept]
        judged, accepted = [0.0] * len(stood), [0.0] * len(stood)
        firsts = dropped = 0.0
        for children in forest.steps:
            known, stands = list[int](), list[bool]()
            each = zip(
                children.rows.tolist(),
                children.parents.tolist(),
                children.ranks.tolist(),
                children.nodes.tolist(),
                children.chances.tolist(),
                strict=True,
            )
            decided = False  # whether a better sibling stands
            for at, (row, parent, rank, node, chance) in enumerate(each):
                decided = decided and rank > 0
                if decided or not (parent < 0 or parent in stood[row]):
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
                elif decided:
                    self._caught += 1
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
