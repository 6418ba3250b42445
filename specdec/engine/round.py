"""One round as it unfolds, and what is noted about it when it is over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.drafters.base import Candidates, Drafter
from specdec.engine.asked import Asked
from specdec.engine.choosing import Choosing
from specdec.engine.grown import Frontier, GrownTrees
from specdec.engine.scheduler import LiveRow
from specdec.lossless.proposal import Proposal
from specdec.lossless.sampling import NO_TOKEN, SamplingBatch, candidate_numbers, signed64
from specdec.lossless.verification import MODES, Mode
from specdec.measure.clock import RoundTimer
from specdec.measure.speedup import SpeedupMeter
from specdec.model.cache import SlotCache
from specdec.model.rows import upload
from specdec.model.sharing import common_prefix
from specdec.model.trees import Tree, Trees, in_trees
from specdec.policies.base import (
    MOST_WIDTH,
    DraftStep,
    RoundOutcome,
    RoundStart,
    StopPolicy,
)
from specdec.policies.chains import NOTHING, Chain

APART = 0x9E3779B97F4A7C15
"""Spreads numbers of admissions over 64 bits, away from those of rounds."""

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
        number: of the round in the engine, if rows learn from each other what to propose, or how
            far to go.
        trees: as they were drafted, if candidates branch; `proposal` is then what is submitted.
        paths: for each row the numbers of the submitted candidates that stand.
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
    trees: GrownTrees | None = None
    paths: Sequence[Sequence[int]] = ()
    _numbers: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept, self.known = [0] * len(self.rows), [()] * len(self.rows)

    def behind(self, number: int | None) -> Round:
        """The next round of the same rows as far as candidates are drawn by it: see `number`."""
        nothing = Proposal(len(self.rows), 0, self.proposal.candidates.device)
        given = self.timer, self.asked, self.mode, self.start
        return Round(self.rows, *given, False, nothing, nothing.lengths, number=number)

    @property
    def drafted(self) -> Sequence[int]:
        """Candidates of each row."""
        return (self.trees.proposal if self.trees is not None else self.proposal).lengths

    @property
    def accepted(self) -> list[int]:
        """Accepted candidates of each row."""
        return [max(0, len(tokens) - 1) for tokens in self.committed]

    @functools.cached_property
    def drafted_paths(self) -> list[Sequence[int]]:
        """As `paths`, in the numbers that candidates had when they were drafted."""
        if self.trees is None:
            return [*self.paths]
        return [self.trees.path(row, path) for row, path in enumerate(self.paths)]

    def tree(self, row: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """A row's candidates as they were drafted: parents, those submitted, and those accepted."""
        path = self.drafted_paths[row] if self.committed[row] else ()
        if self.trees is None:
            return range(-1, self.drafted[row] - 1), range(self.submitted[row]), path
        return self.trees.proposal.parents[row], self.trees.kept[row], path

    @property
    def target_tokens(self) -> int:
        """Packed tokens of the verification."""
        return self.start.target_tokens + sum(self.submitted)

    @property
    def sampling(self) -> SamplingBatch:
        """The rows' sampling parameters."""
        return self.asked.sampling

    def adjusted(
        self, logits: Tensor, owner: Tensor, at: Tensor, behind: Tensor | None = None
    ) -> Tensor:
        """Logits [n, V] as the rows in `owner` [n] ask for, at output positions `at` [n].

        The candidates before each position count as if they stood: `behind` int64 [n, k], or those
        that were submitted.
        """
        if self.asked.adjuster is not None:
            if behind is None:
                behind = self.proposal.behind(owner)
            logits = self.asked.adjuster(logits, owner, at, behind)
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
            return NOTHING
        chain = self.chains[slot]
        forced = min(chain.forced, n)
        return Chain(chain.tokens[:n], chain.evidence[: n - forced], forced)

    def begun(self, most: int) -> Proposal:
        """The round's proposal as it is, with room for so many candidates of each row."""
        return Proposal.certain(self.known, self.proposal.candidates.device, most)

    @functools.cached_property
    def branches(self) -> Trees:
        """What is submitted as the target reads it; None: candidates follow each other."""
        parents = self.proposal.parents
        if parents is None:
            return None
        return in_trees(
            [Tree(len(row.tokens), own) for row, own in zip(self.rows, parents, strict=True)]
        )

    def take(self, verdicts: Sequence[Sequence[int]], complete: Sequence[bool]) -> None:
        """Note what verification gave.

        Args:
            verdicts: of each row how far its candidates stand (`Mode.verify`), the bonus token,
                how many of the target's states were not finite, and the candidates.
            complete: whether a row's tokens are all fed.
        """
        self.infected = [row for row, verdict in enumerate(verdicts) if verdict[2]]
        self.paths = [self.proposal.path(row, verdict[0]) for row, verdict in enumerate(verdicts)]
        self.committed = [
            [*(verdict[3 + node] for node in path), verdict[1]] if ready else []
            for ready, path, verdict in zip(complete, self.paths, verdicts, strict=True)
        ]

    def keep_paths(self, target: SlotCache, drafter: Drafter | None) -> None:
        """Leave the caches what stands of the trees; rows have their tokens of before the round."""
        if self.trees is None or drafter is None:
            return
        rows = [row for row, own in enumerate(self.proposal.lengths) if own]
        bases = [len(row.tokens) for row in self.rows]
        target.keep(rows, [bases[row] for row in rows], [self.paths[row] for row in rows])
        read, paths = [*self.trees.stored], self.drafted_paths
        stored = [self.trees.stored_path(row, paths[row]) for row in read]
        drafter.cache.keep(read, [bases[row] for row in read], stored)

    def read(
        self, raw: Tensor, adjusted: Tensor, parameters: SamplingBatch, first: Sequence[int]
    ) -> None:
        """Keep the log-probabilities of committed tokens.

        Args:
            raw, adjusted, parameters: as of `LogprobReader.read`.
            first: where each row's scored positions begin.
        """
        if self.asked.reader is None:
            return
        judged = [
            [begin, *(begin + 1 + node for node in path)]
            for begin, path in zip(first, self.paths, strict=True)
        ]
        told = self.asked.reader.read(raw, adjusted, parameters, judged, self.committed)
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
        come from what others have drawn, or are chosen by what became of theirs, nobody may draw by
        the same numbers, not even a row of the same seed: then all count the engine's, each behind
        the number of its admission.
        """
        if self.number is None:
            return [row.counts.rounds for row in self.rows]
        return [signed64(self.number ^ row.turn * APART) for row in self.rows]

    def numbers(self, depth: int) -> Tensor:
        """float64 [rows]: what drawn candidates number `depth` are drawn by, under `rejection`."""
        block, place = divmod(depth - 1, BLOCK)
        if block not in self._numbers:
            begins = np.array(self._drawn_from) + block * BLOCK
            numbers = candidate_numbers(
                [signed64(row.sampling.seed) for row in self.rows],
                self._rounds,
                begins + np.arange(BLOCK)[:, None],
            )
            device = self.sampling.temperature.device
            self._numbers[block] = torch.from_numpy(numbers).to(device, non_blocking=True)
        return self._numbers[block][place]

    @functools.cached_property
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

    def branching(
        self, frontier: Frontier, index: Tensor, depth: int, policy: StopPolicy
    ) -> Choosing:
        """How the children of some nodes, which lie at `depth`, are drawn and looked at.

        Args:
            frontier: the nodes, and `index` int64 [n], their rows on the device.
            depth: from 1.
            policy: what it wants to know of them, and how many it wants.
        """
        assert self.trees is not None, "chains are drawn by `choosing`"
        params, at, adjust = self.sampling, None, None
        rows = [row for row, _ in frontier]
        positions = [self.rows[row].generated + depth - 1 for row in rows]
        if self.asked.of_logits:
            (place,) = upload(index.device, positions)
            behind = self.trees.proposal.behind(index, frontier)
            adjust = functools.partial(self.adjusted, owner=index, at=place, behind=behind)
        if not params.all_greedy:
            params = params.rows(index)
        if self.mode is MODES["rejection"]:
            numbers = self._numbers_of(rows, positions, policy.width)
            drawn = torch.from_numpy(numbers).to(index.device, non_blocking=True)
            params = replace(params, drawn=drawn)
        elif not params.all_greedy:
            (at,) = upload(index.device, positions)
        return Choosing(self.mode, params, at, policy.wanted, policy.head, adjust, policy.width)

    def _numbers_of(
        self, rows: Sequence[int], positions: Sequence[int], width: int
    ) -> NDArray[np.float64]:
        """float64 [n, width]: what children of nodes of some rows are drawn by.

        Nodes at one position are told apart by how many their row has before them.
        """
        before = [0] * len(rows)
        for i in range(1, len(rows)):
            before[i] = before[i - 1] + 1 if rows[i] == rows[i - 1] else 0
        branches = MOST_WIDTH * np.array(before)[:, None] + np.arange(width)
        seeds = [signed64(self.rows[row].sampling.seed) for row in rows]
        numbers = self._rounds
        rounds = [numbers[row] for row in rows]
        seed, number, at = (np.array(each)[:, None] for each in (seeds, rounds, positions))
        return candidate_numbers(seed, number, at, branches)

    def outcome(self) -> RoundOutcome:
        """What the policy learns from."""
        trees = self.trees
        return RoundOutcome(
            start=self.start,
            drafted=self.drafted,
            submitted=self.submitted,
            accepted=self.accepted,
            draft_costs=self.draft_costs,
            verify_cost=(self.target_tokens, self.timer.rest),
            unseen=self.unseen,
            known=self.proposal.known,
            looked_up=[*map(self._judged, self.chains, self.committed)],
            parents=trees.proposal.parents if trees is not None else (),
            kept=trees.kept if trees is not None else (),
            path=self.drafted_paths if trees is not None else (),
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
