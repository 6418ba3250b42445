"""The tree that a policy grows for one row of a replay, along a transcript."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from specdec.simulate.transcripts import Signals, Transcript

ROOT = -1
"""The number of what all nodes follow: the row's last token."""


@dataclass(slots=True, eq=False)
class Growth:
    """A row's tree in one round, and what the transcript says of its nodes.

    Attributes:
        transcript: of the row.
        at: output tokens before the round.
        parents: by node: the number of the one that it follows.
        expanded: nodes whose children were drawn, which the draft has read therefore.
    """

    transcript: Transcript
    at: int
    parents: list[int] = field(default_factory=list)
    expanded: set[int] = field(default_factory=set)
    # By node: its depth, and the place of the first wrong choice on the way to it. Where there is
    # none this is the text's last place, behind which nothing is known.
    _depths: list[int] = field(default_factory=list)
    _wrong: list[int] = field(default_factory=list)
    _right: list[bool] = field(default_factory=list)

    def _state(self, node: int) -> tuple[int, int, bool]:
        """Depth, place of the first wrong choice, and whether there is none so far."""
        if node == ROOT:
            return 0, len(self.transcript.ranks) - 1, True
        return self._depths[node], self._wrong[node], self._right[node]

    def place(self, node: int) -> tuple[int, int]:
        """Output tokens before a node's children, and the place of the first wrong choice."""
        depth, wrong, _ = self._state(node)
        return self.at + depth, wrong

    def expand(self, node: int, width: int) -> Signals:
        """float32 [width, len(Signal)], of children drawn of a node."""
        self.expanded.add(node)
        return self.transcript.choices(*self.place(node))[:width]

    def add(self, parent: int, rank: int) -> int:
        """Make a child a node: its number."""
        depth, wrong, right = self._state(parent)
        place, end = self.at + depth, len(self.transcript.ranks)
        stands = right and place < end and int(self.transcript.ranks[place]) == rank
        self.parents.append(parent)
        self._depths.append(depth + 1)
        self._wrong.append(min(place, wrong) if right and not stands else wrong)
        self._right.append(stands)
        return len(self.parents) - 1

    def path(self, kept: Collection[int]) -> list[int]:
        """The nodes that stand among those that were submitted, from the root on."""
        # Of siblings one stands at most, and nodes come in topological order.
        return [node for node, stands in enumerate(self._right) if stands and node in kept]

    def judged(self, kept: Collection[int]) -> list[int]:
        """The submitted nodes of which one may learn: none behind the end of the text."""
        end = len(self.transcript.ranks) - self.at
        return [node for node in kept if self._depths[node] <= end]
