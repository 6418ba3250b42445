"""Policies that look at no candidate: none, fixed, heuristic. They never make the host wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.measure.calibration import Flags
from specdec.policies.base import (
    MOST_CANDIDATES,
    MOST_WIDTH,
    DraftStep,
    RoundOutcome,
    RoundStart,
    StopPolicy,
)
from specdec.policies.memory import RowMemory
from specdec.policies.settings import setting


@dataclass
class NoDrafting(StopPolicy):
    """No candidates: plain decoding, one token per row and round."""

    name = "none"
    summary = "drafts nothing"
    drafts = False


@dataclass
class Fixed(StopPolicy):
    """Always k candidates, or a tree that is k deep.

    The tree has every path that leaves the draft's first choices at most once: along these each
    node has `width` children, and every other node has one. If a child stands with probability a,
    its next best sibling with b, and so on, a node at depth d that leaves them once is worth
    b a^(d-1). That falls no faster than the first choices' own a^d. Whatever leaves them twice is
    worth b/a times less. So this shape has what is worth most for its number of nodes, unless the
    draft is poor.
    """

    name = "fixed"
    summary = "drafts `k` candidates in every round, or a tree `k` deep if `width` is above 1"

    k: int = setting(4, 0, MOST_CANDIDATES, "candidates of a round")
    width: int = setting(1, 1, MOST_WIDTH, "children of the nodes that the draft likes best")

    @property
    def most(self) -> int:
        aside = (self.width - 1) * self.k * (self.k + 1) // 2
        return min(self.k + aside, MOST_CANDIDATES)

    def budget(self, start: RoundStart) -> Sequence[int]:
        return [self.k] * len(start.rows)

    def keep(self, step: DraftStep) -> Flags:
        return leaving_once(step, self.width)


def leaving_once(step: DraftStep, width: int) -> Flags:
    """bool [n]: which children are on paths that leave the draft's first choices once at most.

    Args:
        width: children of the nodes of first choices; others have one.
    """
    assert step.parents is not None and step.ranks is not None, "asked of trees"
    # A row's first node at each depth is the one of first choices alone.
    _, first, row = np.unique(step.rows, return_index=True, return_inverse=True)
    along = step.parents == step.parents[first][row]
    kept: Flags = (step.ranks == 0) | (along & (step.ranks < width))
    return kept


@dataclass
class Heuristic(StopPolicy):
    """Hugging Face's schedule, per row: k grows by 2 after a full acceptance, else shrinks by 1.

    With `k_min` 0, a row that has come down to 0 begins again at `k`.
    """

    name = "heuristic"
    summary = "per row, drafts two more after a full acceptance, one fewer otherwise"

    k: int = setting(4, 0, MOST_CANDIDATES, "candidates of a row's first round")
    k_min: int = setting(1, 0, MOST_CANDIDATES, "least candidates of a round")
    k_max: int = setting(20, 1, MOST_CANDIDATES, "most candidates of a round")

    def budget(self, start: RoundStart) -> Sequence[int]:
        return [self._current(row) for row in start.rows]

    def _current(self, row: RowMemory) -> int:
        return row.k or self._within(self.k)

    def _within(self, k: int) -> int:
        return min(max(k, self.k_min), self.k_max)

    def observe(self, outcome: RoundOutcome) -> None:
        for row, submitted, accepted in zip(
            outcome.start.rows, outcome.submitted, outcome.accepted, strict=True
        ):
            if submitted:
                grown = 2 if accepted == submitted else -1
                row.k = self._within(self._current(row) + grown)
