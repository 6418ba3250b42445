"""Which kind of rounds is the fastest, as measured.

A round has chains of candidates, or trees. Trees bring more tokens, and take the host more time.

And a round looks at each candidate while it is drafted, or at none. Who looks drafts where it pays,
and a device that works beside the host waits for the answer meanwhile. Who does not drafts the
number that pays on average, and learns from the candidates later.

Which is the fastest depends on host, device, batch and text. So all kinds that are possible are
measured: expected tokens per second, for each size of batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from specdec.policies.base import RoundOutcome

FIRST = 48
"""Rows times rounds of each kind before the fastest one is chosen, of at least LEAST rounds.

Raised, the choice is surer and comes later. What a row is expected to yield in a round differs by a
third, which 48 of them make 4%.
"""

LEAST = 3
"""Least rounds of each kind: the time of a single one may be that of a pause."""

FAR = 0.8
"""A kind is given up after LEAST rounds if it reaches less than this part of the fastest one.

Raised, chance decides more often; lowered, a kind that is surely slower is tried for longer.
"""

AGAIN = 64
"""One round in so many is of another kind than the fastest, so that a change is noticed.

Raised, later; lowered, more is lost where that kind is much slower.
"""

MEMORY = 0.95
"""Weight that is left of a kind's rounds after one more of it: 20 are remembered."""


class Kind(NamedTuple):
    """How a round drafts.

    Attributes:
        looks: whether it looks at candidates while they are drafted.
        branches: whether these are trees.
    """

    looks: bool = True
    branches: bool = False


@dataclass(slots=True)
class _Measured:
    rounds: int = 0
    rows: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.rounds else 0.0


@dataclass(slots=True)
class _Size:
    """What rounds of one size of batch brought, by kind.

    Attributes:
        since: rounds of the fastest kind since the last of another.
        turn: whose turn among the others is next.
    """

    kinds: dict[Kind, _Measured] = field(default_factory=lambda: defaultdict(_Measured))
    since: int = 0
    turn: int = 0

    def fastest(self, possible: Sequence[Kind]) -> Kind:
        return max(possible, key=lambda kind: self.kinds[kind].rate)

    def unsure(self, kind: Kind, best: float) -> bool:
        """Whether too little is known of a kind, where the fastest has the rate `best`."""
        known = self.kinds[kind]
        few = known.rows < FIRST and known.rate > FAR * best
        return known.rounds < LEAST or few


class Kinds:
    """Measures kinds of rounds, and chooses."""

    def __init__(self) -> None:
        self._sizes = defaultdict[int, _Size](_Size)  # by the power of two that holds the rows

    def fastest(self, rows: int, possible: Sequence[Kind]) -> Kind:
        """The fastest of some kinds for so many rows, as far as one knows."""
        return self._sizes[rows.bit_length()].fastest(possible)

    def choose(self, rows: int, possible: Sequence[Kind]) -> Kind:
        """The kind of the next round of so many rows.

        Args:
            possible: at least one; the first is taken where nothing is known.
        """
        if len(possible) == 1:
            return possible[0]
        size = self._sizes[rows.bit_length()]
        fastest = size.fastest(possible)
        best = size.kinds[fastest].rate
        if unsure := [kind for kind in possible if size.unsure(kind, best)]:
            return min(unsure, key=lambda kind: size.kinds[kind].rounds)
        if size.since < AGAIN:
            size.since += 1
            return fastest
        others = [kind for kind in possible if kind != fastest]
        size.since, size.turn = 0, size.turn + 1
        return others[size.turn % len(others)]

    def ended(self, rows: int, kind: Kind, tokens: float, seconds: float) -> None:
        """Learn from a round: the tokens that it was expected to yield once all was drawn."""
        known = self._sizes[rows.bit_length()].kinds[kind]
        known.rounds += 1
        known.rows += rows
        known.tokens = MEMORY * known.tokens + tokens
        known.seconds = MEMORY * known.seconds + seconds


def expected(outcome: RoundOutcome) -> float:
    """Tokens that a round's submitted candidates were expected to yield, once they were drawn."""
    notes, submitted = outcome.start.notes, outcome.submitted
    if outcome.path:
        return float(notes["forest"].expected(outcome.kept))
    steps, _ = notes["judged"]
    taken = notes.get("taken") or [()] * len(submitted)
    tokens = sum(sum(each[:n]) for each, n in zip(taken, submitted, strict=True))
    tokens += sum(
        survival
        for depth, step in enumerate(steps, start=1)
        for row, survival in zip(step.rows, step.survival, strict=True)
        if len(taken[row]) + depth <= submitted[row]
    )
    return float(tokens)
