"""Policies that look at no candidate: none, fixed, heuristic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.policies.base import RoundOutcome, RoundStart, StopPolicy


@dataclass
class Fixed(StopPolicy):
    """Always k candidates."""

    k: int = 4

    def budget(self, start: RoundStart) -> Sequence[int]:
        return [self.k] * len(start.rows)


@dataclass
class Heuristic(StopPolicy):
    """Hugging Face's schedule, per row: k grows by 2 after a full acceptance, else shrinks by 1."""

    k: int = 4
    k_min: int = 1
    k_max: int = 20

    def budget(self, start: RoundStart) -> Sequence[int]:
        return [row.k or self.k for row in start.rows]

    def observe(self, outcome: RoundOutcome) -> None:
        for row, submitted, accepted in zip(
            outcome.start.rows, outcome.submitted, outcome.accepted, strict=True
        ):
            if submitted:
                k = (row.k or self.k) + (2 if accepted == submitted else -1)
                row.k = min(max(k, self.k_min), self.k_max)
