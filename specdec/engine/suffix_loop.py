"""Looks candidates up for all rows of a round at once, and keeps the index up to date."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec.drafters.suffix import SuffixIndex
from specdec.engine.ending import Ending
from specdec.engine.round import Round
from specdec.engine.scheduler import LiveRow
from specdec.lossless.proposal import Proposal
from specdec.measure.clock import PhaseClock
from specdec.model.sharing import SharedCaches
from specdec.policies.base import StopPolicy


class SuffixLoop:
    """Asks a suffix index for candidates, and a policy which of them to verify.

    Args:
        index: what was written before.
        policy: decides.
        clock: times it.
        device: the target's.
    """

    def __init__(
        self, index: SuffixIndex, policy: StopPolicy, clock: PhaseClock, device: torch.device
    ) -> None:
        self._index, self._policy, self._clock, self._device = index, policy, clock, device

    def run(self, this: Round, shared: SharedCaches) -> None:
        """Fill the round's proposal with the candidates that the policy wants verified."""
        with self._clock.phase({"draft": 1.0}):
            each = zip(this.rows, this.start.room, strict=True)
            this.chains = [self._index.chain(row, room) for row, room in each]
        with self._clock.phase({"decide": 1.0}):
            counts = self._policy.choose(this.start, this.chains)
        if not any(counts):
            return
        taken = [chain.tokens[:n] for chain, n in zip(this.chains, counts, strict=True)]
        this.proposal, this.submitted = Proposal.certain(taken, self._device), counts
        if this.asked.masks is not None:
            for depth in range(max(counts)):
                rows = [row for row, n in enumerate(counts) if n > depth]
                this.asked.masks.follow(rows, torch.tensor([taken[row][depth] for row in rows]))

    def read(self, rows: Sequence[LiveRow], endings: Sequence[Ending | None]) -> None:
        """Take in what the rows of a round have written, up to their ends if it has ended them."""
        for row, ending in zip(rows, endings, strict=True):
            self._index.read(row, row.output_start + ending.length if ending else None)
