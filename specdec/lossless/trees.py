"""Verification of candidates that branch: which path of each row's tree stands, if any.

Rows begin at `first` of the packed positions, as in specdec/lossless/verification.py. There a tree
has its places one after another: the root, whose logits judge its children and which always stands,
then the nodes. So what judges the children of place i of row b is at `first[b] + i`. A row walks
from its root to one child after another until none stands, and its bonus token is drawn where the
walk ends.

Matching. The target chooses a token at each place, and the walk goes to the child that has it. So
the output is the sequence of the target's own choices, whatever the tree is.

Rejection. The children y_1, y_2, .. of a place were drawn from q without replacement, and their
number is independent of them. They are tried in this order. With p_1 = p and q_1 = q,

    y_i stands with probability min(1, p_i(y_i) / q_i(y_i)); else
    p_(i+1) = (p_i - q_i)+, normalised:  what the target has left, and
    q_(i+1) = q_i without y_i, normalised:  what the next one was drawn from,

and after the last child the bonus token is drawn from what is left of p (SpecInfer, arXiv
2305.09781, algorithm 2; Sequoia, arXiv 2402.12374, algorithm 2). By theorem 1 of 2302.01318 each
trial that ends in a token gives one of law p_i if what is drawn after a rejection has the law
p_(i+1). The next trial gives one of that law, and so on back from the last child, whose bonus
token has it by construction. What is below a child depends on that child alone, so that the same
holds for the next place. Where q_i has nothing left, y_i was not drawn but given, and is the only
mass of its q_i: as in `reject_certain`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.lossless.proposal import Nodes
from specdec.lossless.sampling import block_masses


def match_tree(choices: Tensor, first: Tensor, nodes: Nodes) -> tuple[Tensor, Tensor]:
    """Walk to the child that the target chooses too, as long as there is one.

    Args:
        choices: int64 [M], the token the target chooses at each packed position, or NO_TOKEN.
        first: int64 [B].
        nodes: the rows' trees.

    Returns:
        int64 [B], the place where each row's walk ends, and int64 [B], the target's choice there.
    """
    place, row = torch.zeros_like(first), torch.arange(len(first), device=first.device)
    nobody = nodes.tokens.shape[1]
    for _ in range(nodes.depth):
        children = nodes.children[row, place]
        same = nodes.tokens.gather(1, children) == choices[first + place][:, None]
        chosen = torch.where(same & (children > 0), children, nobody).amin(1)
        place = torch.where(chosen < nobody, chosen, place)
    return place, choices[first + place]


def reject_tree(
    p: Tensor, first: Tensor, q: Tensor, q_row: Tensor, nodes: Nodes, u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Recursive rejection sampling; see above.

    A greedy row is its one-hot case: the walk goes to the child that is the target's argmax.

    Args:
        p: float32 [M, V], the target's distributions at the packed positions.
        first: int64 [B].
        q: float32 [D, V], the draft's distributions.
        q_row: int64 [B, K + 1], from which of them the children of each place were drawn; anything
            valid where there are none.
        nodes: the rows' trees.
        u: float64 [B, depth, width] uniform numbers in [0, 1) for the children tried at each depth,
            independent of the nodes.

    Returns:
        int64 [B], the place at which each row's walk ends; int64 [B], how deep that is; float32
        [B, V], what the bonus token is drawn from (not normalised). The children of a place whose q
        is NaN fall, and leave p as it is.
    """
    place, depth, going = torch.zeros_like(first), torch.zeros_like(first), first >= 0
    residual = p.new_zeros(len(first), p.shape[1])
    whole = first >= 0  # rows whose bonus token is drawn from p as it is
    for level in range(nodes.depth):
        row = where(going)
        at = place[row]
        here, source = first[row] + at, q_row[row, at]
        children = nodes.children[row, at]
        tokens = nodes.tokens[row].gather(1, children)
        there = (children > 0) & going[row, None]
        best = tokens[:, 0]
        stands = there[:, 0] & (u[row, level, 0] * q[source, best] < p[here, best])
        rank = stands.long() - 1
        fell = there[:, 0] & ~stands
        some = where(fell)
        rank[some], left = _second_choice(
            p[here[some]],
            q[source[some]],
            tokens[some],
            there[some] & fell[some, None],
            u[row[some], level],
            rank[some],
        )
        none = fell & (rank < 0)
        whole[row] &= ~none
        into = row[some]
        residual[into] = torch.where(none[some, None], left, residual[into])
        going[row] = rank >= 0
        child = children.gather(1, rank.clamp(min=0)[:, None])[:, 0]
        place[row] = torch.where(rank >= 0, child, at)
        depth[row] += (rank >= 0).long()
    own = where(whole)
    residual[own] = torch.where(whole[own, None], p[first[own] + place[own]], residual[own])
    return place, depth, residual


def _second_choice(
    p: Tensor, q: Tensor, tokens: Tensor, there: Tensor, u: Tensor, rank: Tensor
) -> tuple[Tensor, Tensor]:
    """Which of n places' children stands where the first has fallen.

    Args:
        p, q: float32 [n, V], the target's and the draft's distributions there.
        tokens: int64 [n, width], the children; there: bool [n, width], whether they are any.
        u: float64 [n, width], their numbers.
        rank: int64 [n], -1 where none stands so far.

    Returns:
        int64 [n], the number among the children of the one that stands, or -1; float32 [n, V], what
        is then left of p.
    """
    judged = ~q[:, :1].isnan()
    left, mass = p, torch.ones_like(u[:, :1])
    for i in range(tokens.shape[1]):
        token, asked = tokens[:, i : i + 1], there[:, i : i + 1] & (rank < 0)[:, None]
        total = torch.ones_like(mass) if i == 0 else _mass(q)
        given = total <= 0
        q = q.scatter(1, token, torch.where(given, 1.0, q.gather(1, token)))
        total = torch.where(given, 1.0, total)
        if i:
            q_token, p_token = q.gather(1, token), left.gather(1, token)
            stands = asked & (u[:, i : i + 1] * q_token * mass < p_token * total)
            rank = torch.where(stands[:, 0], i, rank)
            asked = asked & ~stands
        rest = (left / mass.float() - q / total.float()).clamp_(min=0)
        # Where rounding alone refuses a token nothing is left: what there was is the right answer.
        rest_mass = _mass(rest)
        falls = asked & judged & (rest_mass > 0)
        left, mass = torch.where(falls, rest, left), torch.where(falls, rest_mass, mass)
        q = q.scatter(1, token, 0.0)
    return rank, left


def _mass(weights: Tensor) -> Tensor:
    """float64 [n, 1]: sums of weights [n, V]."""
    return block_masses(weights).sum(-1, keepdim=True)


def every(flags: Tensor) -> Tensor:
    """All rows: their indices."""
    return torch.arange(len(flags), device=flags.device)


def where(flags: Tensor) -> Tensor:
    """The rows to compute: those with the flag; on an accelerator all, where asking costs more."""
    return flags.nonzero()[:, 0] if flags.device.type == "cpu" else every(flags)
