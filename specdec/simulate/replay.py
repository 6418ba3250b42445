"""Replaying stop policies over recorded acceptance, under any cost model.

A `Transcript` says of one row's text which candidate would be accepted at each position, and what a
policy would see of it (specdec/simulate/record.py). `replay` lets a real `StopPolicy` decide over
such rows as the Engine would let it, on a virtual clock: a draft step takes D(packed tokens), the
rest of a round V(packed tokens). So policies meet the same texts, candidates and costs, on no
particular machine and in seconds. Left out is what is the same for every policy: feeding prompts to
the target, and the first output token, which comes with it.

specdec/simulate/bound.py says what is the least that any policy could take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import numpy as np

from specdec.drafters.eagle import pending_of
from specdec.measure.calibration import Array
from specdec.policies.base import (
    MOST_CANDIDATES,
    DraftStep,
    RoundOutcome,
    RoundStart,
    RowMemory,
    StopPolicy,
)
from specdec.policies.costs import CostModel
from specdec.request import Counts
from specdec.simulate.growth import ROOT, Growth
from specdec.simulate.transcripts import Transcript

LAPS = 4
"""Rows per slot that a steady replay runs at least.

Raised, replays take longer and depend less on which rows come first.
"""

RESAMPLES = 4000
"""Bootstrap samples behind an interval. More make its ends repeat more closely."""


# ----------------------------------------------------------------------- replay


@dataclass(slots=True, eq=False)
class Replay:
    """What a policy did over some transcripts; ratios are derived from counts and seconds here.

    Attributes:
        rows: each transcript's counts. The tokens that came with its prompt are not among them.
        row_seconds: float [rows], each transcript's share of its rounds' virtual seconds; with one
            live row simply its own.
    """

    rows: list[Counts]
    row_seconds: Array

    @property
    def counts(self) -> Counts:
        """Summed over rows."""
        total = Counts()
        for row in self.rows:
            total.add(row)
        return total

    @property
    def row_tokens(self) -> Array:
        """float [rows], tokens committed."""
        return np.array([float(row.committed) for row in self.rows])

    @property
    def seconds(self) -> float:
        """Virtual seconds of all rounds."""
        return float(self.row_seconds.sum())

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per virtual second."""
        return self.counts.committed / self.seconds

    @property
    def verification_rate(self) -> float:
        """Target forwards per output token of a row (arXiv 2405.19715, §4)."""
        counts = self.counts
        return counts.rounds / counts.committed

    @property
    def discard_rate(self) -> float:
        """Candidates drafted in vain per output token (ibid.)."""
        counts = self.counts
        return (counts.drafted - counts.accepted) / counts.committed


@dataclass(slots=True)
class _Row:
    """A transcript on its way: `at` output tokens so far, `unread` ones for the draft to read."""

    number: int
    transcript: Transcript
    at: int
    unread: int
    memory: RowMemory = field(default_factory=RowMemory)

    @classmethod
    def of(cls, number: int, transcript: Transcript) -> _Row:
        """A row that has its first token."""
        tokens = transcript.prompt_tokens + transcript.first
        # Who reads features reads no token that has none yet: the last one.
        return cls(number, transcript, transcript.first, tokens - transcript.reads_again)

    @property
    def pending(self) -> int:
        """Of the unread tokens, those that policies count (`Drafter.pending`)."""
        return pending_of(self.unread) if self.transcript.reads_again else self.unread


def replay(
    transcripts: Sequence[Transcript],
    policy: StopPolicy,
    costs: CostModel,
    live: int = 1,
    *,
    steady: bool = False,
) -> Replay:
    """Let a policy speculate along the transcripts, `live` rows side by side, as the Engine would.

    A policy that learns goes on from what it knows; give it other transcripts first to warm it up.

    Args:
        policy: asked for more than a transcript's `most` candidates or its `width`, it gets these.
        costs: the virtual clock; a policy that refines costs needs a copy of its own.
        live: rows are refilled from the transcripts in order.
        steady: count only rounds in which all `live` rows are there, and go round the transcripts
            until there are LAPS rows a slot.
    """
    result = Replay([Counts() for _ in transcripts], np.zeros(len(transcripts)))
    numbered = [
        (i, transcript)
        for i, transcript in enumerate(transcripts)
        if transcript.first < len(transcript.accepted)
    ]
    rounds = max(len(numbered), LAPS * live) if steady and numbered else len(numbered)
    queue = deque(islice(cycle(numbered), rounds))
    rows: list[_Row] = []
    while queue or rows:
        while queue and len(rows) < live:
            number, transcript = queue.popleft()
            rows.append(_Row.of(number, transcript))
        if steady and len(rows) < live:
            break
        _round(rows, policy, costs, result)
        rows = [row for row in rows if row.at < len(row.transcript.accepted)]
    return result


def _round(rows: Sequence[_Row], policy: StopPolicy, costs: CostModel, result: Replay) -> None:
    """One round: what `Engine.step` does, without models."""
    width = min(row.transcript.width for row in rows)
    start = RoundStart(
        rows=[row.memory for row in rows],
        room=[max(row.transcript.limit - row.at, 0) for row in rows],
        decoding=[True] * len(rows),
        contexts=[row.transcript.prompt_tokens + row.at for row in rows],
        draft_pending=[row.pending for row in rows],
        target_tokens=len(rows),
        free_trimming=all(row.transcript.free_trimming for row in rows),
        nodes=[MOST_CANDIDATES] * len(rows) if width > 1 else (),
    )
    wanted = policy.budget(start)
    limits = zip(wanted, start.room, rows, strict=True)
    budget = [min(k, room, row.transcript.most) for k, room, row in limits]
    if policy.branches and width > 1:
        _end(rows, start, policy, costs, result, _grown(rows, start, budget, policy, costs))
    else:
        _end(rows, start, policy, costs, result, _drafted(rows, start, budget, policy, costs))


@dataclass(slots=True)
class _Proposed:
    """What was drafted for the rows of a round, and what became of it.

    Attributes:
        drafted, submitted, accepted: candidates per row.
        known: candidates per row of which the transcript knows, up to the first that falls.
        read: how many accepted candidates the draft has read, per row.
        costs: packed tokens and seconds of each draft step.
        parents, kept, path: as in `RoundOutcome`.
    """

    drafted: Sequence[int]
    submitted: Sequence[int]
    accepted: Sequence[int]
    known: Sequence[int]
    read: Sequence[int]
    costs: list[tuple[int, float]]
    parents: Sequence[Sequence[int]] = ()
    kept: Sequence[Sequence[int]] = ()
    path: Sequence[Sequence[int]] = ()


def _end(
    rows: Sequence[_Row],
    start: RoundStart,
    policy: StopPolicy,
    costs: CostModel,
    result: Replay,
    made: _Proposed,
) -> None:
    """Verify, commit, and tell the policy."""
    packed = len(rows) + sum(made.submitted)
    verify_cost = (packed, float(costs.verify(packed)))
    share = (verify_cost[1] + sum(spent for _, spent in made.costs)) / len(rows)
    each = zip(rows, made.drafted, made.submitted, made.accepted, made.read, strict=True)
    for row, drafted, submitted, accepted, read in each:
        left = len(row.transcript.ranks) - row.at
        kept = min(accepted + 1, left)
        result.rows[row.number].add(Counts(1, drafted, submitted, min(accepted, kept), kept))
        result.row_seconds[row.number] += share
        row.at += kept
        row.unread = accepted + 1 - read if drafted else row.unread + 1
    policy.observe(
        RoundOutcome(
            start,
            made.drafted,
            made.known,
            made.accepted,
            made.costs,
            verify_cost,
            parents=made.parents,
            kept=made.kept,
            path=made.path,
        )
    )


def _drafted(
    rows: Sequence[_Row],
    start: RoundStart,
    budget: Sequence[int],
    policy: StopPolicy,
    costs: CostModel,
) -> _Proposed:
    """Candidates that follow each other."""
    drafted = [0] * len(rows)
    spent: list[tuple[int, float]] = []
    active = [i for i, k in enumerate(budget) if k > 0]
    packed = sum(rows[i].unread for i in active)
    while active:
        spent.append((packed, float(costs.draft(packed))))
        depth = len(spent)
        for i in active:
            drafted[i] = depth
        going = np.array([budget[i] > depth for i in active])
        if policy.wanted:
            signals = [rows[i].transcript.seen(rows[i].at, depth - 1) for i in active]
            step = DraftStep(np.array(active), depth, np.stack(signals).astype(np.float64))
            going &= policy.go_on(step)
        active = [i for i, on in zip(active, going, strict=True) if on]
        packed = len(active)
    submitted = policy.submit(drafted) if spent else drafted
    runs = [int(row.transcript.runs[row.at]) for row in rows]
    accepted = [min(k, run) for k, run in zip(submitted, runs, strict=True)]
    # Past the end of the text nothing is known of candidates, and nothing can be learned.
    left = [len(row.transcript.ranks) - row.at for row in rows]
    ends = zip(submitted, accepted, runs, left, strict=True)
    known = [a if run == most else k for k, a, run, most in ends]
    # The draft's cache holds all candidates but the last, as far as they stand and stay.
    read = [
        0 if row.transcript.reads_again else max(min(a, d - 1), 0)
        for row, a, d in zip(rows, accepted, drafted, strict=True)
    ]
    return _Proposed(drafted, submitted, accepted, known, read, spent)


def _grown(
    rows: Sequence[_Row],
    start: RoundStart,
    budget: Sequence[int],
    policy: StopPolicy,
    costs: CostModel,
) -> _Proposed:
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
    known_ = [tree.judged(nodes) for tree, nodes in zip(trees, kept_, strict=True)]
    return _Proposed(
        drafted=[*map(len, parents_)],
        submitted=[*map(len, kept_)],
        accepted=[*map(len, path)],
        known=[*map(len, known_)],
        read=[len(tree.expanded.intersection(p)) for tree, p in zip(trees, path, strict=True)],
        costs=spent,
        parents=parents_,
        kept=known_,
        path=path,
    )


# -------------------------------------------------------------------- statistics


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio with its 95% interval."""

    value: float
    low: float
    high: float


def faster(base: Replay, other: Replay, seed: int = 0) -> Ratio:
    """How many times the tokens per second of `base` those of `other` are.

    The interval is from a paired bootstrap over prompts (percentiles): both sides are resampled
    alike, so what makes a prompt easy or hard for both cancels.
    """
    weights = _resamples(len(base.rows), seed)

    def ratio(w: Array) -> Array:
        speeds = [(w @ side.row_tokens) / (w @ side.row_seconds) for side in (other, base)]
        result: Array = speeds[0] / speeds[1]
        return result

    low, high = np.quantile(ratio(weights), [0.025, 0.975])
    return Ratio(float(ratio(np.ones(len(base.rows)))), float(low), float(high))


def acceptance(transcripts: Sequence[Transcript], seed: int = 0) -> Ratio:
    """How often a candidate behind the true text is accepted; interval as in `faster`."""
    stood = np.array([float(transcript.accepted.sum()) for transcript in transcripts])
    n = np.array([float(len(transcript.accepted)) for transcript in transcripts])
    weights = _resamples(len(transcripts), seed)
    low, high = np.quantile((weights @ stood) / (weights @ n), [0.025, 0.975])
    return Ratio(float(stood.sum() / n.sum()), float(low), float(high))


def acceptance_by_position(
    transcripts: Sequence[Transcript], most: int = 8, seed: int = 0
) -> list[tuple[Ratio, int]]:
    """P(candidate i is accepted | those before it are), for i = 1..most, and how often it was met.

    Over rounds of `most` candidates that follow one another, as `fixed` would run them; intervals
    as in `faster`. It ends where no round got.
    """
    reached, stood = np.zeros((len(transcripts), most)), np.zeros((len(transcripts), most))
    for number, transcript in enumerate(transcripts):
        at = transcript.first
        while at < len(transcript.accepted):
            ends = transcript.limit - at, len(transcript.accepted) - at
            k = max(min(most, transcript.most, *ends), 0)
            a = min(int(transcript.runs[at]), k)
            reached[number, : min(a + 1, k)] += 1
            stood[number, :a] += 1
            at += a + 1
    weights = _resamples(len(transcripts), seed)
    result = []
    for i in range(most):
        met = reached[:, i].sum()
        if not met:
            break
        seen = weights @ reached[:, i]
        rates = (weights @ stood[:, i])[seen > 0] / seen[seen > 0]
        low, high = np.quantile(rates, [0.025, 0.975])
        rate = Ratio(float(stood[:, i].sum() / met), float(low), float(high))
        result.append((rate, int(met)))
    return result


def _resamples(rows: int, seed: int) -> Array:
    """float [RESAMPLES, rows]: how often each row is in each bootstrap sample."""
    chance = np.random.default_rng(seed)
    return chance.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES).astype(np.float64)
