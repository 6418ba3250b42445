"""Trees of candidates: which of a row's last tokens follow which, and where that leaves them.

A row of a forward may end in the nodes of a tree. They are stored one after the other, parents
before children, but a node belongs behind its own ancestors: its *position* is its depth behind the
tree's base, and it attends to what is before the base, to its ancestors and to itself. A *mask* of
64 bits says which nodes these are; in ascending order they are the path to it from the base on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.model.rows import PackedRow, Row

MOST_NODES = 64
"""Nodes of a tree: bits of a mask."""


@dataclass(frozen=True, slots=True)
class Tree:
    """What the last tokens of one row of a forward follow.

    Attributes:
        base: the place in the slot at which node 0 is stored; the token before it is the root.
        parents: of all nodes from there to the end of the forward, those included that earlier
            forwards fed: the number of the node that each follows, -1 for the root.

    Raises:
        ValueError: there are more than MOST_NODES, or one comes before its parent.
    """

    base: int
    parents: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.parents) > MOST_NODES:
            raise ValueError(f"a tree has {len(self.parents)} nodes; at most {MOST_NODES} may be")
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"node {node} follows {parent}; parents come before children")

    @property
    def branches(self) -> bool:
        """Whether any node follows another than the one before it."""
        return any(parent != node - 1 for node, parent in enumerate(self.parents))


Trees = Sequence[Tree | None] | None
"""Of each row of a forward, if it ends in one; None: none does."""


def in_trees(trees: Sequence[Tree | None]) -> Trees:
    """Those that branch; of a chain each token follows the one before it, as without a tree."""
    branching = [tree if tree is not None and tree.branches else None for tree in trees]
    return branching if any(branching) else None


def longest(rows: Sequence[Row], trees: Trees) -> int:
    """Tokens of the longest row that is no tree; 0 if there is none."""
    counts = [count for _, count in rows]
    if trees is None:
        return max(counts)
    return max((n for n, tree in zip(counts, trees, strict=True) if tree is None), default=0)


def lay_out(
    rows: Sequence[PackedRow], trees: Sequence[Tree | None]
) -> tuple[list[int], list[int], list[int]]:
    """Positions, bases and masks of packed tokens, some of which are nodes.

    A token that is none has an empty mask and the position behind it as its base, so that in every
    case `base` plus the bits of the mask are the positions that it sees.

    Args:
        rows: as they are stored.
        trees: of each row, if it ends in one.

    Raises:
        ValueError: a tree does not end where its row does.
    """
    positions: list[int] = []
    bases: list[int] = []
    masks: list[int] = []
    for row, tree in zip(rows, trees, strict=True):
        end = row.start + row.tokens
        base = end if tree is None else tree.base
        positions += range(row.start, min(base, end))
        bases += range(row.start + 1, min(base, end) + 1)
        masks += [0] * (min(base, end) - row.start)
        if tree is None:
            continue
        if base + len(tree.parents) != end:
            raise ValueError(f"a row ends at {end}, its tree at {base + len(tree.parents)}")
        depths, paths = _paths(tree.parents)
        first = max(0, row.start - base)
        positions += [base - 1 + depth for depth in depths[first:]]
        bases += [base] * (len(depths) - first)
        masks += paths[first:]
    return positions, bases, masks


def _paths(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Depths of nodes, from 1, and masks of their paths as signed 64-bit numbers."""
    depths: list[int] = []
    masks: list[int] = []
    for node, parent in enumerate(parents):
        own = 1 << node if node < MOST_NODES - 1 else -1 << node
        depths.append(1 if parent < 0 else depths[parent] + 1)
        masks.append(own if parent < 0 else masks[parent] | own)
    return depths, masks


def positions_of(paths: Tensor, stored: int) -> Tensor:
    """Which positions the tokens of a slot have for tokens that look at them.

    Args:
        paths: int64 [2, ...], bases and masks of tokens.
        stored: how many of a slot's tokens there are to look at.

    Returns:
        int64 [..., stored]; what is not before the base and not on the path has `stored` or more,
        which no token sees.
    """
    bases, masks = paths[..., None]
    at = torch.arange(stored, device=paths.device)
    bits = masks >> torch.arange(MOST_NODES, device=paths.device) & 1
    behind = torch.where(bits > 0, bases + bits.cumsum(-1) - 1, stored)
    behind = torch.nn.functional.pad(behind, (0, 1), value=stored)
    node = (at - bases).clamp(-1, MOST_NODES)  # -1: before the base
    return torch.where(node < 0, at, behind.gather(-1, node.clamp(min=0)))
