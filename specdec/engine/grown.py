"""The trees of a round as they were drafted, of which verification may get a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from specdec.lossless.proposal import TreeProposal

Frontier = list[tuple[int, int]]
"""Nodes to expand: row and number, -1 for the root; rows in order, and each row's nodes."""


@dataclass(slots=True)
class GrownTrees:
    """The trees of a round as they were drafted.

    Attributes:
        proposal: all nodes.
        stored: of each row that drafted, the nodes that the drafter has read, in that order.
        kept: of each row, the nodes that were submitted.
    """

    proposal: TreeProposal
    stored: dict[int, list[int]]
    kept: Sequence[Sequence[int]] = ()
    _places: dict[tuple[int, int], int] = field(default_factory=dict)

    def read(self, nodes: Frontier) -> list[list[int]]:
        """Note that these are read next; the parents of all that was read, by row of these."""
        for row, node in nodes:
            self._places[row, node] = len(self.stored[row])
            self.stored[row].append(node)
        parents = self.proposal.parents
        return [
            [self._places.get((row, parents[row][node]), -1) for node in self.stored[row]]
            for row, _ in groupby(row for row, _ in nodes)
        ]

    def path(self, row: int, path: Sequence[int]) -> list[int]:
        """The numbers among all of a row's nodes of a path among the submitted ones."""
        return [self.kept[row][node] for node in path]

    def stored_path(self, row: int, path: Sequence[int]) -> list[int]:
        """As far as the drafter has read a path among all nodes: their numbers among those read."""
        return [self._places[row, node] for node in path if (row, node) in self._places]
