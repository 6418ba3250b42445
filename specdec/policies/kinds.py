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
"""Rows times rounds of a kind before it is known, of at least LEAST rounds.

Raised, the choice is surer and comes later. What a row is expected to yield in a round differs by a
third, which 48 of them make 4%.
"""

LEAST = 3
"""Least rounds of a kind that is known: the time of a single one may be that of a pause."""

COLD = 4
"""First rounds of each kind that do not count.

What runs for the first time takes longer, and trees have to find their floor. Raised, kinds that
are slower are tried for longer.
"""

AGAIN = 64
"""One round in so many is of another kind than the fastest, so that a change is noticed.

Raised, later; lowered, more is lost where that kind is much slower.
"""

MOST_LOST = 0.01
"""Share of the time that rounds of other kinds than the fastest may lose.

Raised, a faster kind is found sooner, at that price.
"""

CREDIT = 300
"""Rounds whose share may be lost before they came. Raised, short jobs lose more."""

PAUSE = 3.0
"""Most that a round's seconds count for, in those of the median round of its kind.

Also most that it may lose, in what the fastest kind would have taken. What is longer is a pause of
the machine. Raised, pauses decide between kinds.
"""

DOUBT = 100.0
"""Tokens that must come before it counts half by what expectations of a kind were wrong.

Raised, estimates that are wrong decide for longer; lowered, chance does.
"""

FORGET = 0.99
"""Weight that is left of what was expected and what came after one more round of a kind."""

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
    expected: float = 0.0
    came: float = 0.0
    last: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MEMORY))

    @property
    def few(self) -> bool:
        """Whether too little is known of it."""
        return self.rows < FIRST or self.rounds < COLD + LEAST

    def add(self, rows: int, tokens: float, seconds: float, came: float) -> None:
        self.rounds += 1
        self.expected = FORGET * self.expected + tokens
        self.came = FORGET * self.came + came
        if self.rounds <= COLD:
            return
        self.rows += rows
        self.last.append((tokens, seconds))
        most = PAUSE * median(spent for _, spent in self.last)
        spent = sum(min(each, most) for _, each in self.last)
        right = (self.came + DOUBT) / (self.expected + DOUBT)
        self.rate = right * sum(tokens for tokens, _ in self.last) / spent


@dataclass(slots=True)
class _Size:
    """What rounds of one size of batch brought, by kind.

    Attributes:
        rounds, seconds: of all kinds.
        lost: seconds more than the fastest kind would have taken for the same tokens.
        since: rounds of the fastest kind since the last of another.
    """

    kinds: dict[Kind, _Measured] = field(default_factory=lambda: defaultdict(_Measured))
    rounds: int = 0
    seconds: float = 0.0
    lost: float = 0.0
    since: int = 0

    def fastest(self, possible: Sequence[Kind]) -> Kind:
        return max(possible, key=lambda kind: self.kinds[kind].rate)

    @property
    def may_lose(self) -> bool:
        """Whether a slower kind may be tried."""
        return self.lost * self.rounds <= MOST_LOST * self.seconds * (self.rounds + CREDIT)


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
            possible: at least one; the first is measured first, and the others against it.
        """
        size = self._sizes[rows.bit_length()]
        if len(possible) == 1 or size.kinds[possible[0]].rounds < COLD + LEAST:
            return possible[0]
        fastest = size.fastest(possible)
        size.since += 1
        others = sorted(possible, key=lambda kind: size.kinds[kind].rounds)
        others.remove(fastest)
        known = not any(size.kinds[kind].few for kind in others)
        if size.since <= (AGAIN if known else 1) or not size.may_lose:
            return fastest
        size.since = 0
        return others[0]

    def ended(self, rows: int, kind: Kind, tokens: float, seconds: float, came: float) -> None:
        """Learn from a round.

        Args:
            tokens: what it was expected to yield once all was drawn, which says more than what
                came, if expectations are right.
            came: what came.
        """
        size = self._sizes[rows.bit_length()]
        best = max(known.rate for known in size.kinds.values()) if size.kinds else 0.0
        size.rounds += 1
        size.seconds += seconds
        if best and kind != size.fastest([*size.kinds]):
            due = tokens / best
            size.lost += min(max(seconds - due, 0.0), PAUSE * due)
        size.kinds[kind].add(rows, tokens, seconds, came)


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
