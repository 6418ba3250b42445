"""What a policy drafts in a round of a replay, along transcripts, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec.drafters.eagle import pending_of
from specdec.policies.base import DraftStep, RoundStart, StopPolicy
from specdec.policies.chains import NOTHING, Chain
from specdec.policies.costs import CostModel
from specdec.policies.memory import RowMemory
from specdec.simulate.growth import ROOT, Growth
from specdec.simulate.transcripts import Signals, Transcript


@dataclass(slots=True)
class PlayedRow:
    """A transcript on its way: `at` output tokens so far, `unread` ones for the draft to read."""

    number: int
    transcript: Transcript
    at: int
    unread: int
    memory: RowMemory = field(default_factory=RowMemory)

    @classmethod
    def of(cls, number: int, transcript: Transcript) -> PlayedRow:
        """A row that has its first token."""
        tokens = transcript.prompt_tokens + transcript.first
        # Who reads features reads no token that has none yet: the last one.
        return cls(number, transcript, transcript.first, tokens - transcript.reads_again)

    @property
    def pending(self) -> int:
        """Of the unread tokens, those that policies count (`Drafter.pending`)."""
        return pending_of(self.unread) if self.transcript.reads_again else self.unread

    def chain(self, most: int) -> Chain:
        """What may be looked up now: at most so many candidates."""
        looked_up = self.transcript.looked_up
        return NOTHING if looked_up is None else looked_up.chain(self.at, most)

    @property
    def stood(self) -> int:
        """How many of these stand."""
        looked_up = self.transcript.looked_up
        return 0 if looked_up is None else int(looked_up.stood[self.at])

    def reach(self, taken: int) -> int:
        """How many candidates would stand: `taken` looked-up ones, and the draft's behind them."""
        if self.stood < taken:
            return self.stood
        return taken + int(self.transcript.runs[self.at + taken])

    def seen(self, taken: int, index: int) -> Signals:
        """Signals of the draft's candidate `index` (from 0) behind `taken` that were looked up."""
        if not taken:
            return self.transcript.seen(self.at, index)
        last = min(self.at + self.reach(taken), len(self.transcript.ranks) - 1)
        first: Signals = self.transcript.choices(self.at + taken + index, last)[0]
        return first


@dataclass(frozen=True, slots=True)
class Found:
    """What was looked up for the rows of a round, and how much of it the policy takes.

    Attributes:
        chains: of each row, if candidates are looked up.
        taken: candidates of each row's chain, with which its proposal begins.
    """

    chains: Sequence[Chain]
    taken: Sequence[int]

    @classmethod
    def of(cls, rows: Sequence[PlayedRow], start: RoundStart, policy: StopPolicy) -> Found:
        """Look up, and ask the policy."""
        each = zip(rows, start.room, strict=True)
        chains = [row.chain(min(room, policy.most)) for row, room in each]
        return cls(chains, policy.choose(start, chains))

    def judged(self, row: int, kept: int, stood: int) -> tuple[int, int]:
        """How many of a row's candidates `kept` tokens judge, and how many of these stand."""
        judged = min(len(self.chains[row].tokens), kept)
        return judged, min(stood, judged)


@dataclass(slots=True)
class Proposed:
    """The candidates of a round's rows, and what became of them.

    Attributes:
        drafted, submitted, accepted: candidates per row.
        judged: submitted ones per row of which the transcript knows what becomes.
        read: how many tokens that stand the draft has read, per row.
        costs: packed tokens and seconds of each draft step.
        parents, kept, path: as in `RoundOutcome`.
    """

    drafted: Sequence[int]
    submitted: Sequence[int]
    accepted: Sequence[int]
    judged: Sequence[int]
    read: Sequence[int]
    costs: list[tuple[int, float]]
    parents: Sequence[Sequence[int]] = ()
    kept: Sequence[Sequence[int]] = ()
    path: Sequence[Sequence[int]] = ()


def drafted_chains(
    rows: Sequence[PlayedRow],
    start: RoundStart,
    taken: Sequence[int],
    budget: Sequence[int],
    policy: StopPolicy,
    costs: CostModel,
) -> Proposed:
    """Candidates that follow each other: `taken` of each row's looked-up ones, then the draft's."""
    drafted = [*taken]
    spent: list[tuple[int, float]] = []
    active = [i for i, k in enumerate(budget) if k > 0]
    packed = sum(rows[i].unread + taken[i] for i in active)
    while active:
        spent.append((packed, float(costs.draft(packed))))
        depth = len(spent)
        for i in active:
            drafted[i] += 1
        going = np.array([budget[i] > depth for i in active])
        if policy.wanted:
            signals = [rows[i].seen(taken[i], depth - 1) for i in active]
            step = DraftStep(np.array(active), depth, np.stack(signals).astype(np.float64))
            going &= policy.go_on(step)
        active = [i for i, on in zip(active, going, strict=True) if on]
        packed = len(active)
    submitted = policy.submit(drafted) if spent else drafted
    reach = [row.reach(n) for row, n in zip(rows, taken, strict=True)]
    accepted = [min(k, most) for k, most in zip(submitted, reach, strict=True)]
    # Past the end of the text nothing is known of candidates, and nothing can be learned.
    left = [len(row.transcript.ranks) - row.at for row in rows]
    ends = zip(submitted, accepted, reach, left, strict=True)
    judged = [a if stands == most else k for k, a, stands, most in ends]
    # The draft's cache holds all candidates but the last, as far as they stand and stay.
    read = [0] * len(rows)
    for i, row in enumerate(rows):
        if drafted[i] > taken[i]:
            stays = 0 if row.transcript.reads_again else min(accepted[i], drafted[i] - 1)
            read[i] = row.unread + stays
    return Proposed(drafted, submitted, accepted, judged, read, spent)


def grown_trees(
    rows: Sequence[PlayedRow],
    start: RoundStart,
    budget: Sequence[int],
    policy: StopPolicy,
    costs: CostModel,
) -> Proposed:
    """Trees of candidates."""
    trees = [Growth(row.transcript, row.at) for row in rows]
    width = min(policy.width, *(row.transcript.width for row in rows))
    spent: list[tuple[int, float]] = []
    frontier = [(i, ROOT) for i, k in enumerate(budget) if k > 0]
    packed = sum(rows[i].unread for i, _ in frontier)
    while frontier:
        spent.append((packed, float(costs.draft(packed))))
        children = [(*each, rank) for each in frontier for rank in range(width)]
        of, parents, ranks = (np.array(each) for each in zip(*children, strict=True))
        signals = [trees[i].expand(node, width) for i, node in frontier]
        step = DraftStep(of, len(spent), np.concatenate(signals).astype(np.float64), parents, ranks)
        kept = policy.keep(step)
        going = kept & policy.go_on(step) if policy.wanted else kept
        frontier = []
        for (i, parent, rank), keep, on in zip(children, kept, going, strict=True):
            if keep and len(trees[i].parents) < start.nodes[i]:
                node = trees[i].add(parent, rank)
                if on and budget[i] > len(spent):
                    frontier.append((i, node))
        packed = len(frontier)
    parents_ = [tree.parents for tree in trees]
    kept_ = policy.prune(parents_) if spent else parents_
    path = [tree.path(set(nodes)) for tree, nodes in zip(trees, kept_, strict=True)]
    judged_ = [tree.judged(nodes) for tree, nodes in zip(trees, kept_, strict=True)]
    return Proposed(
        drafted=[*map(len, parents_)],
        submitted=[*map(len, kept_)],
        accepted=[*map(len, path)],
        judged=[*map(len, judged_)],
        read=[
            row.unread + len(tree.expanded.intersection(own)) if tree.parents else 0
            for row, tree, own in zip(rows, trees, path, strict=True)
        ],
        costs=spent,
        parents=parents_,
        kept=judged_,
        path=path,
    )
