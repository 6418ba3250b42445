"""Finds the candidates that need no draft, for all rows of a round at once, and keeps their index.

They stand in front of a draft's. A grammar forces the next tokens of a row, and behind these may
come what followed the same tokens before.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec.drafters.suffix import SuffixIndex
from specdec.engine.ending import Ending
from specdec.engine.round import Round
from specdec.engine.scheduler import LiveRow
from specdec.lossless.grammars import Masks
from specdec.measure.clock import PhaseClock
from specdec.policies.base import StopPolicy
from specdec.policies.chains import NOTHING, Chain

MOST_FORCED = 16
"""Most tokens of a grammar's that a row takes in a round, besides what its policy asks for.

Raised, long keys of an object take fewer rounds, and each row needs cache pages for so many more.
"""


class KnownLoop:
    """Asks grammars and an index for candidates, and a policy which of them to take.

    Args:
        index: what was written before; None: nothing is looked up.
        policy: decides.
        clock: times it.
    """

    def __init__(self, index: SuffixIndex | None, policy: StopPolicy, clock: PhaseClock) -> None:
        self._index, self._policy, self._clock = index, policy, clock

    def number(self, rounds: int) -> int | None:
        """What the engine's round, the one behind so many, is drawn by under `rejection`.

        None: nothing that rows do depends on what others have drawn, and each counts its own. What
        a corpus holds was drawn, too, and perhaps for rows of the same seeds: no two corpora have a
        number in common.
        """
        if self._index is None:
            return rounds if self._policy.estimates else None
        return (self._index.identity << 31) + rounds

    def run(self, this: Round) -> None:
        """Begin the round's proposal with the known candidates that the policy takes."""
        masks, index = this.asked.masks, self._index
        if index is not None and not self._policy.wants_lookups():
            index = None
        if index is None and masks is None:
            self._policy.choose(this.start, [NOTHING] * len(this.rows))
            return
        with self._clock.phase({"decide": 1.0}):
            began = self._clock.now()
            each = enumerate(zip(this.rows, this.start.room, strict=True))
            this.chains = [self._chain(slot, row, room, masks, index) for slot, (row, room) in each]
            counts = self._policy.choose(this.start, this.chains)
            if index is not None:
                self._policy.lookups_took(self._clock.now() - began)
        if any(counts):
            this.lead(counts)

    def _chain(
        self, slot: int, row: LiveRow, room: int, masks: Masks | None, index: SuffixIndex | None
    ) -> Chain:
        """What may come next in a row: at most `room` candidates."""
        if not room:
            return NOTHING
        if masks is None:
            assert index is not None
            return index.chain(row, min(room, self._policy.most))
        forced = masks.forced(slot, min(room, MOST_FORCED))
        if index is None:
            return Chain(forced, (), len(forced))
        most = min(room - len(forced), self._policy.most)
        found = index.chain(row, most, forced)
        tokens = [*forced, *found.tokens]
        fitting = max(masks.fitting(slot, tokens), len(forced))
        evidence = found.evidence[: fitting - len(forced)]
        return Chain(tokens[:fitting], evidence, len(forced))

    def read(self, rows: Sequence[LiveRow], endings: Sequence[Ending | None]) -> None:
        """Take in what the rows of a round have written, up to their ends if it has ended them."""
        if self._index is not None:
            for row, ending in zip(rows, endings, strict=True):
                end = row.output_start + ending.length if ending else None
                self._index.read(row, end)
