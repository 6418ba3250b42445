"""How much of what is drafted was worth verifying lately: what a decision to draft counts on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.measure.calibration import Array

MEMORY = 0.98
"""Weight that is left of what was trimmed after one more round: 50 are remembered.

Raised, a change of rows or costs is followed later. Set by hand.
"""

SHARES = 16
"""Steps in which the share of candidates that are submitted is known.

The seconds of further candidates are kept for each share that occurs. Raised, fewer are met again.
"""

FOLLOW = 0.9
"""Weight that is left of `Trimming.floor` after one more round of trees.

Raised, the floor is steadier and follows the batch later. Set by hand.
"""


class Trimming:
    """Remembers what was drafted and what of it was submitted.

    Attributes:
        floor: the least survival of a tree's node that was worth verifying lately. Where a
            verification has room for so many, this is what a place in it is worth: who takes one
            early, for an unlikely node, has none left for a likelier one that is deeper.
    """

    def __init__(self) -> None:
        # First candidates of rows: all and those worth verifying; expected tokens of both.
        self._firsts = [8.0, 8.0, 4.0, 4.0]
        # Nodes that were expanded, and their children that were worth verifying.
        self._expanded, self._worth = 8.0, 12.0
        self.floor = 0.0

    @property
    def first_ones(self) -> tuple[float, float]:
        """How much of rows' first candidates was worth verifying lately, and of what they yield.

        Those that are dropped are the unlikely ones: a row takes less of the verification than its
        candidates would, and yields hardly less than they do.
        """
        drawn, kept, hoped, left = self._firsts
        return round(kept / drawn * SHARES) / SHARES, left / hoped

    @property
    def spread(self) -> float:
        """Nodes that are worth verifying, for each one that is expanded."""
        return round(self._worth / self._expanded * SHARES) / SHARES

    def note(self, rows: Sequence[int], after: Sequence[float], counts: Sequence[int]) -> None:
        """Take in which first candidates were worth verifying.

        Args:
            rows, after: of the first candidates, and their estimated acceptance.
            counts: candidates worth verifying, by row.
        """
        kept = [p for row, p in zip(rows, after, strict=True) if counts[row]]
        noted = (len(after), len(kept), sum(after), sum(kept))
        self._firsts = [MEMORY * a + b for a, b in zip(self._firsts, noted, strict=True)]

    def note_trees(self, expanded: int, worth: Array, order: Array, best: int) -> None:
        """Take in which of the children that were drawn in a round were worth verifying.

        Args:
            expanded: nodes whose children they are.
            worth: float [n], survival of all of them.
            order: indices of those that there is room for, by falling survival.
            best: how many of these are worth it.
        """
        self._expanded = MEMORY * self._expanded + expanded
        self._worth = MEMORY * self._worth + best
        least = float(worth[order[best - 1]]) if 0 < best < len(worth) else 0.0
        self.floor = FOLLOW * self.floor + (1 - FOLLOW) * least


def likeliest(worth: Array, rows: Array, most: Array) -> Array:
    """Indices of nodes by falling survival, and of each row no more than it has room for.

    Args:
        worth: float [n], survival.
        rows: int [n].
        most: int [rows], room.
    """
    order = np.argsort(-worth, kind="stable")
    of = rows[order]
    by_row = np.argsort(of, kind="stable")
    counts = np.bincount(of, minlength=len(most))
    place = np.empty(len(of), dtype=np.int64)
    place[by_row] = np.arange(len(of)) - (np.cumsum(counts) - counts)[of[by_row]]
    fitting: Array = order[place < most[of]]
    return fitting
