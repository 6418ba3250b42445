"""The trees that a policy grows in a round: what is known of each child that was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.measure.calibration import Array, Flags
from specdec.policies.base import DraftStep, Indices
from specdec.policies.estimators import Estimator, OnlineEstimator
from specdec.policies.siblings import given_parent, sibling_evidence

NONE = -1
"""The number of a child that did not become a node."""


@dataclass(slots=True, eq=False)
class Children:
    """Children drawn in one draft step, as estimators saw them: arrays over n children.

    Attributes:
        rows, parents, ranks, signals: as in `DraftStep`.
        typical: how often first children of each one's row are accepted.
        evidence: float [n, len(Sibling)].
        chances: P(accepted | its parent is, and its better siblings are not), once it is drawn.
        survival: P(accepted), once it is drawn.
        worth: the same by all that may decide whether it is kept.
        nodes: the number of each as a node, or NONE.
    """

    rows: Indices
    parents: Indices
    ranks: Indices
    signals: Array
    typical: Array
    evidence: Array
    chances: Array
    survival: Array
    worth: Array
    nodes: Indices

    def behind(self, better: Indices) -> Indices:
        """The next best siblings of some children, where there are any: indices."""
        after = better + 1
        after = after[after < len(self.ranks)]
        following: Indices = after[self.ranks[after] > 0]
        return following


class Forest:
    """The trees of a round's rows: all children that were drawn, and which of them are nodes.

    Attributes:
        steps: the children, by depth.
        places: how many more nodes each row may have.
        free: whether nodes may be dropped by what they are.
    """

    def __init__(self, typical: Sequence[float], places: Sequence[int], free: bool) -> None:
        self.steps: list[Children] = []
        self.places = np.array(places)
        self._most, self._typical, self.free = self.places.copy(), np.array(typical), free
        # By row and node; the root is the last.
        self._survival = np.ones((len(typical), max(places, default=0) + 1))

    def judge(self, step: DraftStep, first: Estimator, others: OnlineEstimator) -> Children:
        """Estimate the children just drawn; none is a node yet."""
        assert step.parents is not None and step.ranks is not None, "a step of trees"
        rows, ranks, signals = step.rows, step.ranks, step.signals
        typical, evidence = self._typical[rows], sibling_evidence(signals, ranks)
        best, chances = ranks == 0, np.empty((2, len(rows)))
        chances[:, best] = first.predict(signals[best], typical[best])
        if not best.all():
            chances[:, ~best] = others.predict(evidence[~best], typical[~best])
        before, after = chances
        behind = self._survival[rows, step.parents]
        survival = behind * given_parent(after, ranks)
        worth = survival
        if not self.free:  # what is drawn beside a child may say something of it, itself may not
            worth = behind * given_parent(before, ranks)
        children = Children(
            rows,
            step.parents,
            ranks,
            signals,
            typical,
            evidence,
            after,
            survival,
            worth,
            np.full(len(rows), NONE),
        )
        self.steps.append(children)
        return children

    def fitting(self, indices: Indices, beside: Indices | None = None) -> Indices:
        """Some of the children just drawn by falling worth, as many as their rows have places.

        Args:
            indices: the children; beside: others, which have places already.
        """
        children, places = self.steps[-1], self.places
        if beside is not None:
            places = places - np.bincount(children.rows[beside], minlength=len(places))
        return _likeliest(children.worth[indices], children.rows[indices], places, indices)

    def within(self, flags: Flags) -> Indices:
        """The first of some children just drawn, in their order, that rows have places for."""
        rows, some = self.steps[-1].rows, np.flatnonzero(flags)
        found: Indices = some[_place(rows[some], len(self.places)) < self.places[rows[some]]]
        return found

    def keep(self, indices: Indices) -> Flags:
        """Make some of the children just drawn nodes, numbered in their order."""
        children = self.steps[-1]
        kept = np.zeros(len(children.rows), dtype=bool)
        kept[indices] = True
        rows = children.rows[kept]
        numbers = (self._most - self.places)[rows] + _place(rows, len(self.places))
        children.nodes[kept] = numbers
        self.places -= np.bincount(rows, minlength=len(self.places))
        self._survival[rows, numbers] = children.survival[kept]
        return kept

    def drawn(self, *, nodes_only: bool = False) -> tuple[Indices, Indices, Array]:
        """Rows, numbers as nodes and worth of the likeliest children that rows have places for."""
        rows, nodes, worth = (
            np.concatenate([getattr(step, name) for step in self.steps])
            for name in ("rows", "nodes", "worth")
        )
        some = np.flatnonzero(nodes != NONE) if nodes_only else np.arange(len(rows))
        order = _likeliest(worth[some], rows[some], self._most, some)
        return rows[order], nodes[order], worth[order]

    def crowding(self) -> float:
        """What the last place of a row was worth in the mean; nothing where rows have others."""
        rows, _, worth = self.drawn()
        drawn = sum(np.bincount(step.rows, minlength=len(self.places)) for step in self.steps)
        least = np.full(len(self.places), np.inf)
        np.minimum.at(least, rows, worth)
        return float(np.where(drawn > self._most, least, 0.0).mean())

    def chances(self, row: int) -> list[float]:
        """Of each node of a row how likely it is accepted where its turn comes."""
        own = [(step.rows == row) & (step.nodes != NONE) for step in self.steps]
        return [
            p for step, at in zip(self.steps, own, strict=True) for p in step.chances[at].tolist()
        ]

    def flags(self, nodes: Sequence[Sequence[int]]) -> Flags:
        """bool by row and node: some nodes of each row, and the root, which is the last."""
        found = np.zeros(self._survival.shape, dtype=bool)
        found[:, -1] = True
        for row, each in enumerate(nodes):
            found[row, each] = True
        return found

    def expected(self, kept: Sequence[Sequence[int]]) -> float:
        """How many of some nodes, by row, are expected to be accepted."""
        return sum(float(self._survival[row, [*nodes]].sum()) for row, nodes in enumerate(kept))


def _likeliest(worth: Array, rows: Indices, places: Indices, indices: Indices) -> Indices:
    """Of some children those by falling worth that their rows have places for."""
    order = np.argsort(-worth, kind="stable")
    if len(order) > places.min():  # else all fit
        order = order[_place(rows[order], len(places)) < places[rows[order]]]
    found: Indices = indices[order]
    return found


def _place(rows: Indices, n: int) -> Indices:
    """Of each of some children how many of its row, one of n, come before it."""
    order, counts = np.argsort(rows, kind="stable"), np.bincount(rows, minlength=n)
    place = np.empty(len(rows), dtype=np.int64)
    place[order] = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows[order]]
    return place
