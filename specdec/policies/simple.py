"""Policies that look at no candidate: none, fixed, heuristic. They never make the host wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.policies.base import (
    MOST_CANDIDATES,
    RoundOutcome,
    RoundStart,
    RowMemory,
    StopPolicy,
    setting,
)


@dataclass
class NoDrafting(StopPolicy):
    """No candidates: plain decoding, one token per row and round."""

    name = "none"
    summary = "drafts nothing"
    drafts = False


@dataclass
class Fixed(StopPolicy):
    """Always k candidates."""

    name = "fixed"
    summary = "drafts `k` candidates in every round"

    k: int = setting(4, 0, MOST_CANDIDATES, "candidates of a round")

    def budget(self, start: RoundStart) -> Sequence[int]:
        return [self.k] * len(start.rows)


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
