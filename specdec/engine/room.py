"""How many candidates each row has room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.drafters.base import Drafter
from specdec.engine.scheduler import LiveRow
from specdec.model.packing import GRID_TOKENS
from specdec.model.pages import PAGE, pages_of
from specdec.policies.base import MOST_CANDIDATES


@dataclass(frozen=True, slots=True)
class Room:
    """What bounds the candidates of a round's rows.

    Attributes:
        ahead: most candidates of a row; 0: nobody proposes any.
        context: most tokens of a row that the target can read.
        short: whether rows must stay in the grid (specdec/model/packing.py).
        drafter: proposes, if candidates are drafted.
    """

    ahead: int
    context: int
    short: bool
    drafter: Drafter | None

    def depth(self, row: LiveRow) -> int:
        """Most candidates that a decoding row may have behind each other."""
        if row.doubtful:
            return 0
        left = row.sampling.max_new_tokens - row.generated - 1  # the bonus token takes one
        # It has pages for no more than `ahead`.
        most = min(left, GRID_TOKENS - 1 if self.short else self.context, self.ahead)
        if self.drafter is not None:
            most = min(most, self.drafter.room(row))
        return max(0, most)

    def depths(self, seats: Sequence[LiveRow | None], cached: Sequence[int]) -> list[int]:
        """The same by slot; 0 where nobody is, or a row that does not decode yet.

        Args:
            seats: the rows by slot.
            cached: how many of its tokens the target has.
        """
        return [
            self.depth(row) if row is not None and len(row.tokens) - cached[slot] == 1 else 0
            for slot, row in enumerate(seats)
        ]

    def nodes(self, row: LiveRow) -> int:
        """Most nodes that its tree may have; they lie side by side in its last pages."""
        return min(MOST_CANDIDATES, self.ahead, pages_of(row.need) * PAGE - len(row.tokens))
