"""The candidates that rows submit in a round: one behind the other, or as a tree for each row."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from specdec.model.rows import upload


class Proposal:
    """The candidates of one round: what is known without a draft, and behind it what one draws.

    Attributes:
        known: how many candidates of each of B rows nobody drew, its first (host numbers).
        lengths: candidates of each row (host numbers).
        candidates: int64 [B, K]; beyond a row's length, zeros.
    """

    def __init__(self, rows: int, most: int, device: torch.device) -> None:
        self.known, self.lengths = [0] * rows, [0] * rows
        self.candidates = torch.zeros(rows, most, dtype=torch.int64, device=device)
        self._q: list[Tensor] = []
        self._q_row = [[0] * most for _ in range(rows)]

    @classmethod
    def certain(
        cls, chains: Sequence[Sequence[int]], device: torch.device, most: int = 0
    ) -> Proposal:
        """Candidates of B rows that nobody drew: they are given by what was known before.

        Args:
            chains: those of each row.
            most: how many a row will have when others are drawn behind them.
        """
        most = max(most, *map(len, chains))
        proposal = cls(len(chains), most, device)
        if any(chains):
            padded = [[*chain, *[0] * (most - len(chain))] for chain in chains]
            proposal.candidates = torch.from_numpy(np.array(padded)).to(device, non_blocking=True)
            proposal.known = [*map(len, chains)]
            proposal.lengths = [*proposal.known]
        return proposal

    def add(self, rows: Sequence[int], index: Tensor, tokens: Tensor, q: Tensor | None) -> None:
        """Append one candidate to each of n rows.

        Args:
            rows: the rows, and `index` int64 [n], the same on the device.
            tokens: int64 [n].
            q: float32 [n, V], the distributions drawn from, if verification needs them.
        """
        depths = [self.lengths[row] for row in rows]
        same = depths.count(depths[0]) == len(rows)
        column = depths[0] if same else upload(index.device, depths)[0]
        self.candidates[index, column] = tokens
        drawn = sum(map(len, self._q))
        for offset, (row, depth) in enumerate(zip(rows, depths, strict=True)):
            self.lengths[row] += 1
            self._q_row[row][depth] = drawn + offset
        if q is not None:
            self._q.append(q)

    def distributions(self) -> tuple[Tensor, Tensor] | None:
        """q float32 [D, V] and q_row int64 [B, K]; candidate (b, k) came from q[q_row[b, k]].

        Of trees q_row is int64 [B, K + 1], and the children of place k came from q[q_row[b, k]].
        None if no candidate was drawn.
        """
        if not self._q:
            return None
        q_row = torch.from_numpy(np.array(self._q_row, dtype=np.int64))
        return torch.cat(self._q), q_row.to(self.candidates.device, non_blocking=True)

    def known_lengths(self) -> Tensor | None:
        """`known` as a tensor; None if everything was drawn."""
        return upload(self.candidates.device, self.known)[0] if any(self.known) else None

    @property
    def parents(self) -> Sequence[Sequence[int]] | None:
        """Of trees: the number of the node that each follows, -1 for the root, by row."""
        return None

    def nodes(self) -> Nodes | None:
        """The trees as verification takes them; None: candidates follow each other."""
        return None

    def path(self, row: int, place: int) -> Sequence[int]:
        """The numbers of the candidates up to the one at a place; place 0 is before all."""
        return range(place)

    def depths(self, row: int) -> Sequence[int]:
        """How far behind a row's tokens each of its candidates comes, from 1."""
        return range(1, self.lengths[row] + 1)

    def behind(self, owner: Tensor) -> Tensor:
        """int64 [n, k]: candidates up to each place of all rows, whose rows are `owner` int64 [n].

        There may be others behind them.
        """
        return self.candidates[owner]


@dataclass(frozen=True, slots=True)
class Nodes:
    """The trees of B rows on the device. Each has its root at place 0 and node i at place i + 1.

    Attributes:
        tokens: int64 [B, K + 1], the token of each place; of the root, any.
        children: int64 [B, K + 1, width], the places of each place's children, the best first; 0
            where there are no more.
        depth: of the deepest node.
    """

    tokens: Tensor
    children: Tensor
    depth: int

    @property
    def width(self) -> int:
        """The most children of a place."""
        return self.children.shape[2]


class TreeProposal(Proposal):
    """The candidates of one round as the nodes of a tree for each row.

    Nodes of a row are numbered as they come, parents before children.
    """

    def __init__(self, rows: int, most: int, device: torch.device) -> None:
        super().__init__(rows, most, device)
        self._parents: list[list[int]] = [[] for _ in range(rows)]
        self._depths: list[list[int]] = [[] for _ in range(rows)]
        self._q_row = [[0] * (most + 1) for _ in range(rows)]  # by place that children follow

    @property
    def parents(self) -> list[list[int]]:
        return self._parents

    def grow(
        self,
        rows: Sequence[int],
        parents: Sequence[int],
        kept: Sequence[int],
        tokens: Tensor,
        q: Tensor | None,
    ) -> None:
        """Add the first few children of some places; they are numbered in this order.

        Args:
            rows, parents: of n places, the row and the node's number, -1 for the root.
            kept: how many children of each are added.
            tokens: int64 [n, width], the children of each.
            q: float32 [n, V], the distributions that they were drawn from, if verification needs
                them.
        """
        drawn = sum(map(len, self._q))
        width, most = tokens.shape[1], self.candidates.shape[1]
        into: list[int] = []
        source: list[int] = []
        for at, (row, parent, count) in enumerate(zip(rows, parents, kept, strict=True)):
            self._q_row[row][parent + 1] = drawn + at
            depth = 1 if parent < 0 else self._depths[row][parent] + 1
            begin = row * most + self.lengths[row]
            into += range(begin, begin + count)
            source += range(at * width, at * width + count)
            self._parents[row] += [parent] * count
            self._depths[row] += [depth] * count
            self.lengths[row] += count
        if q is not None:
            self._q.append(q)
        places, chosen = upload(self.candidates.device, into, source)
        self.candidates.view(-1)[places] = tokens.flatten()[chosen]

    def of(self, kept: Sequence[Sequence[int]]) -> TreeProposal:
        """The same with some nodes only, numbered anew, in as few columns as they take.

        Args:
            kept: of each row, ascending; with each node its parent and its better siblings.
        """
        most = max(map(len, kept), default=0)
        device = self.candidates.device
        if [*map(len, kept)] == self.lengths:
            whole = copy(self)
            whole.candidates = self.candidates[:, :most]
            whole._q_row = [row[: most + 1] for row in self._q_row]
            return whole
        pruned = TreeProposal(len(kept), most, device)
        index: list[int] = []
        for row, nodes in enumerate(kept):
            number = {-1: -1, **{node: new for new, node in enumerate(nodes)}}
            pruned._parents[row] = [number[self._parents[row][node]] for node in nodes]
            pruned._depths[row] = [self._depths[row][node] for node in nodes]
            own = [self._q_row[row][node + 1] for node in (-1, *nodes)]
            pruned._q_row[row][: len(own)] = own
            pruned.lengths[row] = len(nodes)
            index += [*(node + 1 for node in nodes), *[0] * (most - len(nodes))]
        (places,) = upload(device, index)
        padded = torch.nn.functional.pad(self.candidates, (1, 0))
        pruned.candidates = padded.gather(1, places.view(len(kept), most))
        pruned._q = self._q
        return pruned

    def nodes(self) -> Nodes | None:
        depth = max((max(each, default=0) for each in self._depths), default=0)
        if not depth:
            return None
        rows, places = self.candidates.shape[0], self.candidates.shape[1] + 1
        at: list[int] = []  # row and place of each node's parent, and its rank among the children
        ranks: list[int] = []
        for row, parents in enumerate(self._parents):
            before = [0] * places
            for parent in parents:
                at.append(row * places + parent + 1)
                ranks.append(before[parent + 1])
                before[parent + 1] += 1
        table = np.zeros((rows * places, max(ranks) + 1), dtype=np.int64)
        table[at, ranks] = [*chain.from_iterable(range(1, n + 1) for n in self.lengths)]
        children = torch.from_numpy(table).to(self.candidates.device, non_blocking=True)
        tokens = torch.nn.functional.pad(self.candidates, (1, 0))
        return Nodes(tokens, children.view(rows, places, -1), depth)

    def path(self, row: int, place: int) -> list[int]:
        path: list[int] = []
        node = place - 1
        while node >= 0:
            path.append(node)
            node = self._parents[row][node]
        return path[::-1]

    def depths(self, row: int) -> Sequence[int]:
        return self._depths[row]

    def behind(self, owner: Tensor, nodes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """As `Proposal.behind`; of some `nodes` only: row and number of each, -1 for the root."""
        if nodes is None:
            nodes = [(row, i) for row, n in enumerate(self.lengths) for i in range(-1, n)]
        paths = [self.path(row, node + 1) for row, node in nodes]
        most = max(map(len, paths))
        index = [node for path in paths for node in (*path, *[0] * (most - len(path)))]
        (on_device,) = upload(owner.device, index)
        return self.candidates[owner].gather(1, on_device.view(len(nodes), most))
