"""Candidates that are known without a draft, and what speaks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Evidence(IntEnum):
    """Columns of what speaks for a candidate that was looked up."""

    LENGTH = 0  # tokens of the context that it follows
    FOLLOWED = 1  # how often it followed them so far
    SEEN = 2  # how often anything did
    OWN = 3  # 1 if in the row's own prompt or outputs of the prompt's samples, else 0
    CORPUS = 4  # 1 if in what earlier jobs wrote, else 0


@dataclass(frozen=True, slots=True)
class Chain:
    """Candidates of a row that are known without a draft, one after another.

    Attributes:
        tokens: the candidates.
        evidence: what speaks for each of those that were looked up, by `Evidence`.
        forced: how many of the candidates a grammar forces: the first.
    """

    tokens: Sequence[int]
    evidence: Sequence[Sequence[float]]
    forced: int = 0

    @property
    def sources(self) -> list[str]:
        """Where each candidate comes from, as counts of them are called."""
        found = ("in_rows", "in_corpus", "in_prompt")
        places = (each[Evidence.CORPUS] + 2 * each[Evidence.OWN] for each in self.evidence)
        return [*["forced"] * self.forced, *(found[int(place)] for place in places)]


NOTHING = Chain((), ())
"""No candidate is known."""
