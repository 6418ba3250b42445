"""Whether to look at candidates while they are drafted, beside a device that waits meanwhile.

Who looks at each candidate drafts where it pays, and the device waits for the answer. Who does not
drafts the number that pays on average, and learns from the candidates later. Which of the two is
faster depends on host, device and batch, so both are measured: expected tokens per second, for each
size of batch.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from specdec.policies.base import RoundOutcome

FIRST = 48
"""Rows times rounds of each kind before the faster one is chosen, of at least LEAST rounds.

Raised, the choice is surer and comes later. What a row is expected to yield in a round differs by a
third, which 48 of them make 4%.
"""

LEAST = 3
"""Least rounds of each kind: the time of a single one may be that of a pause."""

AGAIN = 64
"""One round in so many is of the slower kind, so that a change is noticed. Raised, later."""

MEMORY = 0.95
"""Weight that is left of a kind's rounds after one more of it: 20 are remembered."""


@dataclass(slots=True)
class _Kind:
    rounds: int = 0
    rows: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(slots=True)
class _Size:
    """What rounds of one size of batch brought: those that looked, by True, and those that did not.

    Attributes:
        since: rounds of the faster kind since the last of the other.
    """

    kinds: dict[bool, _Kind] = field(default_factory=lambda: {True: _Kind(), False: _Kind()})
    since: int = 0

    @property
    def unsure(self) -> bool:
        """Whether too little is known of a kind."""
        return any(kind.rows < FIRST or kind.rounds < LEAST for kind in self.kinds.values())


class Looking:
    """Measures both kinds of rounds, and chooses."""

    def __init__(self) -> None:
        self._sizes = defaultdict[int, _Size](_Size)  # by the power of two that holds the rows

    def pays(self, rows: int) -> bool:
        """Whether rounds of so many rows are faster with looking, as far as one knows."""
        size = self._sizes[rows.bit_length()]
        looked, unseen = size.kinds[True], size.kinds[False]
        if size.unsure:
            return looked.rounds <= unseen.rounds
        return looked.rate >= unseen.rate

    def choose(self, rows: int) -> bool:
        """Whether the next round of so many rows looks."""
        size, looks = self._sizes[rows.bit_length()], self.pays(rows)
        if size.unsure:
            return looks
        size.since = 0 if size.since >= AGAIN else size.since + 1
        return looks if size.since else not looks

    def ended(self, rows: int, looked: bool, tokens: float, seconds: float) -> None:
        """Learn from a round: the tokens that it was expected to yield once all was drawn."""
        kind = self._sizes[rows.bit_length()].kinds[looked]
        kind.rounds += 1
        kind.rows += rows
        kind.tokens = MEMORY * kind.tokens + tokens
        kind.seconds = MEMORY * kind.seconds + seconds


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
