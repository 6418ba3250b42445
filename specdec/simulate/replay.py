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

from specdec.engine.stats import EngineStats
from specdec.measure.calibration import Array
from specdec.policies.base import MOST_CANDIDATES, RoundOutcome, RoundStart, StopPolicy
from specdec.policies.costs import CostModel
from specdec.request import Counts
from specdec.simulate.rounds import Found, PlayedRow, Proposed, drafted_chains, grown_trees
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
        stats: what an engine counts of candidates, by their sources.
    """

    rows: list[Counts]
    row_seconds: Array
    stats: EngineStats = field(default_factory=EngineStats)

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


def replay(
    transcripts: Sequence[Transcript],
    policy: StopPolicy,
    costs: CostModel,
    live: int = 1,
    *,
    steady: bool = False,
    lookup: bool = False,
    draft: bool = True,
) -> Replay:
    """Let a policy speculate along the transcripts, `live` rows side by side, as the Engine would.

    A policy that learns goes on from what it knows; give it other transcripts first to warm it up.

    Args:
        policy: asked for more than a transcript's `most` candidates or its `width`, it gets these.
        costs: the virtual clock; a policy that refines costs needs a copy of its own.
        live: rows are refilled from the transcripts in order.
        steady: count only rounds in which all `live` rows are there, and go round the transcripts
            until there are LAPS rows a slot.
        lookup: whether a policy that looks candidates up may do so.
        draft: whether there is a draft. `goodput` must be prepared for having none.

    Raises:
        ValueError: candidates are to be looked up, and transcripts do not know them.
    """
    if lookup and any(transcript.looked_up is None for transcript in transcripts):
        raise ValueError("these transcripts were recorded without what could be looked up")
    result = Replay([Counts() for _ in transcripts], np.zeros(len(transcripts)))
    numbered = [
        (i, transcript)
        for i, transcript in enumerate(transcripts)
        if transcript.first < len(transcript.accepted)
    ]
    rounds = max(len(numbered), LAPS * live) if steady and numbered else len(numbered)
    queue = deque(islice(cycle(numbered), rounds))
    rows: list[PlayedRow] = []
    while queue or rows:
        while queue and len(rows) < live:
            number, transcript = queue.popleft()
            rows.append(PlayedRow.of(number, transcript))
        if steady and len(rows) < live:
            break
        _round(rows, policy, costs, result, lookup, draft)
        rows = [row for row in rows if row.at < len(row.transcript.accepted)]
    return result


def _round(
    rows: Sequence[PlayedRow],
    policy: StopPolicy,
    costs: CostModel,
    result: Replay,
    lookup: bool,
    draft: bool,
) -> None:
    """One round: what `Engine.step` does, without models."""
    width = min(row.transcript.width for row in rows)
    start = RoundStart(
        rows=[row.memory for row in rows],
        room=[max(row.transcript.limit - row.at, 0) for row in rows],
        decoding=[True] * len(rows),
        contexts=[row.transcript.prompt_tokens + row.at for row in rows],
        draft_pending=[row.pending if draft else 0 for row in rows],
        target_tokens=len(rows),
        free_trimming=all(row.transcript.free_trimming for row in rows),
        nodes=[MOST_CANDIDATES] * len(rows) if width > 1 else (),
    )
    found = Found((), [0] * len(rows))
    if lookup and policy.looks_up:
        found = Found.of(rows, start, policy)
    budget = [0] * len(rows)
    if draft:
        wanted = zip(policy.budget(start), start.room, rows, found.taken, strict=True)
        budget = [min(k, room - n, row.transcript.most - n) for k, room, row, n in wanted]
    if draft and policy.branches and width > 1 and not any(found.taken):
        made = grown_trees(rows, start, budget, policy, costs)
    else:
        made = drafted_chains(rows, start, found.taken, budget, policy, costs)
    _end(rows, start, policy, costs, result, found, made)


def _end(
    rows: Sequence[PlayedRow],
    start: RoundStart,
    policy: StopPolicy,
    costs: CostModel,
    result: Replay,
    found: Found,
    made: Proposed,
) -> None:
    """Verify, commit, and tell the policy."""
    packed = len(rows) + sum(made.submitted)
    verify_cost = (packed, float(costs.verify(packed)))
    share = (verify_cost[1] + sum(spent for _, spent in made.costs)) / len(rows)
    looked_up: list[tuple[int, int]] = []
    each = zip(rows, made.drafted, made.submitted, made.accepted, made.read, strict=True)
    for i, (row, drafted, submitted, accepted, read) in enumerate(each):
        left = len(row.transcript.ranks) - row.at
        kept = min(accepted + 1, left)
        counts = Counts(1, drafted, submitted, min(accepted, kept), kept)
        result.rows[row.number].add(counts)
        result.stats.count_row(counts, accepted, row.chain(found.taken[i]))
        result.row_seconds[row.number] += share
        if found.chains:
            looked_up.append(found.judged(i, kept, row.stood))
        row.at += kept
        row.unread += accepted + 1 - read
    policy.observe(
        RoundOutcome(
            start,
            made.drafted,
            made.judged,
            made.accepted,
            made.costs,
            verify_cost,
            known=found.taken,
            looked_up=looked_up,
            parents=made.parents,
            kept=made.kept,
            path=made.path,
        )
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
