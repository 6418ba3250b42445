"""Which kind of rounds is the fastest, as measured.

A round has chains of candidates, or trees. Trees bring more tokens, and take the host more time.

And a round looks at each candidate while it is drafted, or at none. Who looks drafts where it pays,
and a device that works beside the host waits for the answer meanwhile. Who does not drafts the
number that pays on average, and learns from the candidates later.

Which is the fastest depends on host, device, batch and text. So all kinds that are possible are
measured: expected tokens per second, for each size of batch.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from specdec.policies.base import RoundOutcome

FIRST = 48
"""Rows times rounds of each kind before the fastest one is chosen, of at least LEAST rounds.

Raised, the choice is surer and comes later. What a row is expected to yield in a round differs by a
third, which 48 of them make 4%.
"""

LEAST = 3
"""Least rounds of each kind: the time of a single one may be that of a pause."""

COLD = 1
"""First rounds of each kind that do not count: what runs for the first time takes longer."""

FAR = 0.8
"""A kind is given up after twice LEAST rounds if it reaches less than this part of the fastest.

Raised, chance decides more often; lowered, a kind that is surely slower is tried for longer.
"""

PAUSE = 2.0
"""Most that a round's seconds count for, in those of the median round of its kind.

What is longer is a pause of the machine. Raised, pauses decide between kinds.
"""

AGAIN = 64
"""One round in so many is of another kind than the fastest, so that a change is noticed.

Raised, later; lowered, more is lost where that kind is much slower.
"""

MEMORY = 24
"""Rounds of each kind that are remembered. Raised, rates are steadier and follow a change later."""


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
    """What is known of a kind: rounds and rows so far, and expected tokens per second lately."""

    rounds: int = 0
    rows: int = 0
    rate: float = 0.0
    last: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MEMORY))

    def add(self, rows: int, tokens: float, seconds: float) -> None:
        self.rounds += 1
        if self.rounds <= COLD:
            return
        self.rows += rows
        self.last.append((tokens, seconds))
        most = PAUSE * median(spent for _, spent in self.last)
        spent = sum(min(each, most) for _, each in self.last)
        self.rate = sum(tokens for tokens, _ in self.last) / spent


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
        rounds = known.rounds - COLD
        few = known.rows < FIRST and (known.rate > FAR * best or rounds < 2 * LEAST)
        return rounds < LEAST or few


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
        self._sizes[rows.bit_length()].kinds[kind].add(rows, tokens, seconds)


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
