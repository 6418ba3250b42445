"""One round as it unfolds, and what is noted about it when it is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from specdec.drafters.base import Choose
from specdec.engine.scheduler import LiveRow
from specdec.lossless.sampling import NO_TOKEN, SamplingBatch
from specdec.lossless.verification import Mode, Proposal
from specdec.measure.clock import RoundTimer
from specdec.measure.speedup import SpeedupMeter
from specdec.policies.base import Explanation, RoundOutcome, RoundStart, StopPolicy
from specdec.request import RoundTrace


@dataclass(slots=True)
class Round:
    """What the engine knows of a round; each of its steps adds its part.

    Attributes:
        rows: the live rows, by slot.
        timer: its seconds.
        sampling: their sampling parameters; under `rejection` with the seeds of this round.
        mode: how candidates are verified.
        start: what the policy may know before drafting.
        control: whether this is a control round, without speculation.
        proposal: the candidates drawn.
        submitted: how many of each row's candidates were verified.
        committed: for each row the tokens that verification gave: accepted candidates, then the
            bonus token, or NO_TOKEN where the row fails; nothing for a row whose prompt is not yet
            fed to its end.
        infected: rows of which the target's states were not all finite.
        kept: how many of these each row's output grew by: fewer where it ended.
        draft_costs: packed tokens and seconds of each draft step.
    """

    rows: list[LiveRow]
    timer: RoundTimer
    sampling: SamplingBatch
    mode: Mode
    start: RoundStart
    control: bool
    proposal: Proposal
    submitted: Sequence[int] = ()
    committed: Sequence[Sequence[int]] = ()
    infected: Sequence[int] = ()
    kept: list[int] = field(init=False)
    draft_costs: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept = [0] * len(self.rows)

    @property
    def accepted(self) -> list[int]:
        """Accepted candidates of each row; none where verification failed."""
        return [
            len(tokens) - 1 if tokens and tokens[-1] != NO_TOKEN else 0 for tokens in self.committed
        ]

    @property
    def target_tokens(self) -> int:
        """Packed tokens of the verification."""
        return self.start.target_tokens + sum(self.submitted)

    def parameters(self, index: Tensor) -> SamplingBatch:
        """The sampling parameters of the rows in `index` [m]; greedy rows are not picked apart."""
        return self.sampling if self.sampling.all_greedy else self.sampling.rows(index)

    def choosing(self, index: Tensor, at: Tensor) -> Choose:
        """How candidates of the rows in `index` [n] are drawn, at output positions `at` [n]."""
        return lambda logits: self.mode.propose(logits, self.parameters(index), at)

    def outcome(self) -> RoundOutcome:
        """What the policy learns from."""
        return RoundOutcome(
            start=self.start,
            drafted=self.proposal.lengths,
            submitted=self.submitted,
            accepted=self.accepted,
            draft_costs=self.draft_costs,
            verify_cost=(self.target_tokens, self.timer.rest),
        )

    def book(self, meter: SpeedupMeter) -> None:
        """Enter the round's seconds and tokens of decoding rows in the speedup meter."""
        decoding = self.start.decoding
        live = sum(decoding)
        tokens = sum(n for n, ready in zip(self.kept, decoding, strict=True) if ready)
        rest = self.timer.rest
        whole = rest + sum(spent for _, spent in self.draft_costs)
        if all(decoding):
            meter.book(live, whole, tokens, control=self.control)
        else:
            without = rest * self.start.target_tokens / self.target_tokens
            meter.book_mixed(whole, without, tokens - live)

    def trace(self, policy: StopPolicy) -> None:
        """Note for each decoding row what the round predicted, decided and met."""
        candidates = self.proposal.candidates.tolist()
        live = sum(self.start.decoding)
        for slot, row in enumerate(self.rows):
            if not self.start.decoding[slot]:
                continue
            if self.control:
                why = Explanation((), "control round")
            elif not self.start.room[slot]:
                why = Explanation((), "no room for a candidate")
            else:
                why = policy.explain(slot)
            row.trace.append(
                RoundTrace(
                    context=self.start.contexts[slot],
                    live=live,
                    candidates=tuple(candidates[slot][: self.proposal.lengths[slot]]),
                    predicted=why.predicted,
                    submitted=self.submitted[slot],
                    accepted=self.accepted[slot],
                    reason=why.reason,
                )
            )
