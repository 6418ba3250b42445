"""One round as it unfolds, and what is noted about it when it is over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from specdec.drafters.base import Candidates
from specdec.engine.asked import Asked
from specdec.engine.choosing import Choosing
from specdec.engine.scheduler import LiveRow
from specdec.lossless.sampling import NO_TOKEN, SamplingBatch, candidate_numbers, signed64
from specdec.lossless.verification import MODES, Mode, Proposal
from specdec.measure.clock import RoundTimer
from specdec.measure.speedup import SpeedupMeter
from specdec.model.rows import upload
from specdec.model.sharing import common_prefix
from specdec.policies.base import DraftStep, Explanation, RoundOutcome, RoundStart, StopPolicy
from specdec.policies.chains import Chain
from specdec.request import RoundTrace

BLOCK = 8
"""Candidates of a row whose random numbers are made at once.

Raised, more are made in vain; lowered, they are made more often.
"""


@dataclass
class Round:
    """What the engine knows of a round; each of its steps adds its part.

    Attributes:
        rows: the live rows, by slot.
        timer: its seconds.
        asked: what they ask for.
        mode: how candidates are verified.
        start: what the policy may know before drafting.
        control: whether this is a control round, without speculation.
        proposal: the candidates.
        submitted: how many of each row's candidates were verified.
        committed: for each row the tokens that verification gave: accepted candidates, then the
            bonus token, or NO_TOKEN where the row fails; nothing for a row whose prompt is not yet
            fed to its end.
        infected: rows of which the target's states were not all finite.
        kept: how many of these each row's output grew by: fewer where it ended.
        draft_costs: packed tokens and seconds of each draft step.
        unseen: the draft steps at which the policy did not look, once the device has them.
        chains: candidates that are known without a draft, by row, if there may be any.
        known: those of them that are taken, by row.
        number: of the round in the engine, if rows learn from each other what to propose.
    """

    rows: list[LiveRow]
    timer: RoundTimer
    asked: Asked
    mode: Mode
    start: RoundStart
    control: bool
    proposal: Proposal
    submitted: Sequence[int] = ()
    committed: Sequence[Sequence[int]] = ()
    infected: Sequence[int] = ()
    kept: list[int] = field(init=False)
    draft_costs: list[tuple[int, float]] = field(default_factory=list)
    unseen: Callable[[], Sequence[DraftStep]] = tuple
    chains: Sequence[Chain] = ()
    known: Sequence[Sequence[int]] = field(init=False)
    number: int | None = None
    _numbers: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept, self.known = [0] * len(self.rows), [()] * len(self.rows)

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

    @property
    def sampling(self) -> SamplingBatch:
        """The rows' sampling parameters."""
        return self.asked.sampling

    def adjusted(self, logits: Tensor, owner: Tensor, at: Tensor) -> Tensor:
        """Logits [n, V] as the rows in `owner` [n] ask for, at output positions `at` [n].

        The candidates drawn so far count as if they stood.
        """
        if self.asked.adjuster is not None:
            logits = self.asked.adjuster(logits, owner, at, self.proposal.candidates)
        masks = self.asked.masks
        return masks.apply(logits, owner, at) if masks is not None else logits

    def add(self, active: Sequence[int], index: Tensor, drawn: Candidates) -> None:
        """Note one more candidate of each active row, which are also in `index`."""
        self.proposal.add(active, index, drawn.tokens, drawn.q)
        if self.asked.masks is not None:
            self.asked.masks.follow(active, drawn.tokens)

    def lead(self, counts: Sequence[int]) -> None:
        """Take so many candidates of each row's chain, in front of all that will be drawn."""
        taken = [chain.tokens[:n] for chain, n in zip(self.chains, counts, strict=True)]
        self.proposal = Proposal.certain(taken, self.proposal.candidates.device)
        self.known, self.submitted = taken, counts
        if self.asked.masks is not None:
            self.asked.masks.lead(taken)

    def taken(self, slot: int) -> Chain:
        """The known candidates of a row."""
        if not (n := self.proposal.known[slot]):
            return Chain((), ())
        chain = self.chains[slot]
        forced = min(chain.forced, n)
        return Chain(chain.tokens[:n], chain.evidence[: n - forced], forced)

    def begun(self, most: int) -> Proposal:
        """The round's proposal as it is, with room for so many candidates of each row."""
        return Proposal.certain(self.known, self.proposal.candidates.device, most)

    def read(
        self, raw: Tensor, adjusted: Tensor, parameters: SamplingBatch, first: Sequence[int]
    ) -> None:
        """Keep the log-probabilities of committed tokens; arguments as of `LogprobReader.read`."""
        if self.asked.reader is None:
            return
        told = self.asked.reader.read(raw, adjusted, parameters, first, self.committed)
        for slot, logprobs in told.items():
            self.rows[slot].logprobs += logprobs

    def parameters(self, index: Tensor) -> SamplingBatch:
        """The sampling parameters of the rows in `index` [m]; greedy rows are not picked apart."""
        return self.sampling if self.sampling.all_greedy else self._drawing.rows(index)

    @functools.cached_property
    def _drawing(self) -> SamplingBatch:
        """The sampling parameters with the seeds of this round, under `rejection`.

        Made when something is drawn first: by then the device has a forward to work on.
        """
        if self.mode is not MODES["rejection"]:
            return self.sampling
        (numbers,) = upload(self.sampling.seed.device, self._rounds)
        return self.sampling.in_round(numbers)

    @property
    def _rounds(self) -> list[int]:
        """The number of each row's round.

        Each row counts its own: what it draws must not depend on its neighbours. But if candidates
        come from what others have drawn, nobody may draw by the same numbers again, not even a row
        of the same seed: then all count the engine's.
        """
        return [row.counts.rounds if self.number is None else self.number for row in self.rows]

    def numbers(self, depth: int) -> Tensor:
        """float64 [rows]: what drawn candidates number `depth` are drawn by, under `rejection`."""
        block, place = divmod(depth - 1, BLOCK)
        if block not in self._numbers:
            numbers = candidate_numbers(
                [signed64(row.sampling.seed) for row in self.rows],
                self._rounds,
                [at + block * BLOCK for at in self._drawn_from],
                BLOCK,
            )
            device = self.sampling.temperature.device
            self._numbers[block] = torch.from_numpy(numbers).to(device, non_blocking=True)
        return self._numbers[block][place]

    @property
    def _drawn_from(self) -> list[int]:
        """The output position of each row's first candidate that is drawn."""
        known = self.proposal.known
        return [row.generated + n for row, n in zip(self.rows, known, strict=True)]

    def choosing(
        self, slots: Sequence[int], index: Tensor, depth: int, policy: StopPolicy
    ) -> Choosing:
        """How candidates number `depth` of some rows are drawn and looked at.

        Args:
            slots: the rows, and `index` int64 [n], the same on the device.
            depth: from 1.
            policy: what it wants to know of them.
        """
        params, at, adjust = self.sampling, None, None
        first = self._drawn_from
        positions = [first[slot] + depth - 1 for slot in slots]
        if self.asked.of_logits:
            (place,) = upload(index.device, positions)
            adjust = functools.partial(self.adjusted, owner=index, at=place)
        if self.mode is MODES["rejection"]:
            params = replace(params, drawn=self.numbers(depth))
        elif not params.all_greedy:
            (at,) = upload(index.device, positions)
        if not params.all_greedy and len(slots) < len(self.rows):
            params = params.rows(index)
        return Choosing(self.mode, params, at, policy.wanted, policy.head, adjust)

    def outcome(self) -> RoundOutcome:
        """What the policy learns from."""
        return RoundOutcome(
            start=self.start,
            drafted=self.proposal.lengths,
            submitted=self.submitted,
            accepted=self.accepted,
            draft_costs=self.draft_costs,
            verify_cost=(self.target_tokens, self.timer.rest),
            unseen=self.unseen,
            known=self.proposal.known,
            looked_up=[*map(self._judged, self.chains, self.committed)],
        )

    @staticmethod
    def _judged(chain: Chain, committed: Sequence[int]) -> tuple[int, int]:
        """How many of a row's candidates the committed tokens judge, and how many of them stand.

        A committed token has the target's distribution. So a candidate that was not submitted
        stands for it as often as it would have been accepted.
        """
        if not committed or committed[-1] == NO_TOKEN:
            return 0, 0
        judged = min(len(chain.tokens), len(committed))
        return judged, common_prefix(chain.tokens[:judged], committed[:judged])

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
            n, known = self.proposal.lengths[slot], self.proposal.known[slot]
            predicted = why.predicted
            if known and (predicted or why.known):  # what nobody doubts is certain
                predicted = (*why.known[:known], *[1.0] * (known - len(why.known)), *predicted)
            row.trace.append(
                RoundTrace(
                    context=self.start.contexts[slot],
                    live=live,
                    candidates=tuple(candidates[slot][:n]),
                    predicted=predicted[:n],
                    submitted=self.submitted[slot],
                    accepted=self.accepted[slot],
                    reason=why.reason,
                    sources=tuple(each.removeprefix("in_") for each in self.taken(slot).sources),
                )
            )
