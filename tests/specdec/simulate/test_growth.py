"""Trees along a transcript."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.policies.base import DraftStep, RoundOutcome, RoundStart, Signal
from specdec.policies.costs import CostModel
from specdec.policies.simple import Fixed
from specdec.request import Counts
from specdec.simulate.allowance import allowed_rate
from specdec.simulate.bound import least_seconds
from specdec.simulate.growth import ROOT, Growth
from specdec.simulate.replay import replay
from specdec.simulate.transcripts import Transcript
from tests.specdec.workloads import linear

DEPTH, WIDTH = 5, 3
COSTS = CostModel(linear(1.0, 0.25), linear(4.0, 0.5))


def transcript_of(ranks: list[int], seed: int = 0) -> Transcript:
    """Its every signal is another number, and it can go on behind wrong choices at each place."""
    n, chance = len(ranks), np.random.default_rng(seed)
    signals = chance.normal(-2, 0.5, (n, WIDTH, len(Signal))).astype(np.float32)
    branches = chance.normal(-2, 0.5, (n, DEPTH, WIDTH, len(Signal))).astype(np.float32)
    return Transcript(
        f"r{seed}", "", 9, 99, False, np.array(ranks), signals, np.arange(n), branches
    )


def test_a_tree_knows_where_it_leaves_the_text() -> None:
    transcript = transcript_of([0, 1, 3, 0])
    tree = Growth(transcript, 1)
    assert np.array_equal(tree.expand(ROOT, 2), transcript.signals[1, :2])
    wrong, right = tree.add(ROOT, 0), tree.add(ROOT, 1)
    assert np.array_equal(tree.expand(wrong, 3), transcript.branches[1, 0])
    assert np.array_equal(tree.expand(right, 3), transcript.signals[2])
    # No choice is right at place 2: behind any of them goes the branch of that place.
    lost = tree.add(right, 2)
    behind = tree.add(lost, 0)
    assert np.array_equal(tree.expand(lost, 3), transcript.branches[2, 0])
    assert np.array_equal(tree.expand(behind, 3), transcript.branches[2, 1])
    assert tree.parents == [ROOT, ROOT, right, lost]
    assert tree.path({wrong, right, lost, behind}) == [right]
    assert tree.path({wrong}) == []


def test_past_the_end_nothing_is_judged() -> None:
    tree = Growth(transcript_of([0, 0]), 1)
    last = tree.add(ROOT, 0)
    past = tree.add(last, 0)
    assert tree.path({last, past}) == [last]
    assert tree.judged([last, past]) == [last]
    assert np.array_equal(tree.expand(last, 1), tree.transcript.branches[1, 0, :1])


class Watched(Fixed):
    """Keeps what it is told."""

    def __init__(self, k: int, width: int) -> None:
        super().__init__(k, width)
        self.wanted = frozenset({Signal.LOG_Q})
        self.starts: list[RoundStart] = []
        self.steps: list[DraftStep] = []
        self.outcomes: list[RoundOutcome] = []

    def budget(self, start: RoundStart) -> list[int]:
        self.starts.append(start)
        return [*super().budget(start)]

    def go_on(self, step: DraftStep) -> np.ndarray:
        self.steps.append(step)
        return super().go_on(step)

    def observe(self, outcome: RoundOutcome) -> None:
        self.outcomes.append(outcome)


def test_a_round_by_hand() -> None:
    """`fixed` 2 x 2 grows two children of the root, and two and one of these."""
    policy = Watched(2, 2)
    done = replay([transcript_of([0, 1, 0, 3, 0])], policy, COSTS)
    first, second = policy.outcomes
    assert first.parents == [[-1, -1, 0, 0, 1]] and first.path == [[1, 4]]
    # At place 4 the text ends, so that nothing is known of the second depth.
    assert second.path == [[0]] and second.kept == [[0, 1]]
    assert done.rows == [Counts(rounds=2, drafted=10, verified=10, accepted=3, committed=4)]
    # The draft has read the first of the two accepted nodes: it lacks the other, and the bonus.
    assert [start.draft_pending for start in policy.starts] == [[10], [2]]
    draft, verify = COSTS.draft, COSTS.verify
    seconds = draft(10) + draft(2) + draft(2) + draft(2) + 2 * verify(6)
    assert done.seconds == pytest.approx(seconds)


def test_trees_of_width_1_are_chains() -> None:
    transcripts = [transcript_of([0, 0, 1, 0, 2, 0, 0, 3, 0, 0, 0, 1], seed) for seed in range(4)]

    class Tree(Fixed):
        def keep(self, step: DraftStep) -> np.ndarray:
            assert step.ranks is not None
            first: np.ndarray = step.ranks == 0
            return first

    for live in (1, 3):
        chains, trees = (replay(transcripts, p, COSTS, live) for p in (Fixed(3), Tree(3, 2)))
        assert chains.rows == trees.rows
        assert chains.row_seconds == pytest.approx(trees.row_seconds)


def test_no_tree_beats_the_clairvoyant_with_trees() -> None:
    chance = np.random.default_rng(5)
    transcripts = [
        transcript_of(chance.choice(4, 40, p=[0.6, 0.2, 0.1, 0.1]).tolist(), seed)
        for seed in range(6)
    ]
    for live in (1, 4):
        bounds = [least_seconds(transcripts, COSTS, live, width).sum() for width in (1, 2, 3)]
        assert bounds == sorted(bounds, reverse=True)
        for width, bound in enumerate(bounds, start=1):
            for k in (1, 2, 4):
                assert replay(transcripts, Fixed(k, width), COSTS, live).seconds >= bound - 1e-9


def test_what_probabilities_allow_lies_between_policies_and_the_clairvoyant() -> None:
    """Where every place looks alike, so that `fixed` is near what can be had."""
    chance = np.random.default_rng(6)
    transcripts = [
        transcript_of(chance.choice(4, 60, p=[0.6, 0.2, 0.1, 0.1]).tolist(), seed)
        for seed in range(5)
    ]
    costs = CostModel(linear(0.5, 0.0), linear(4.0, 0.01))
    tokens = sum(len(each.ranks) - each.first for each in transcripts)
    for each in transcripts:  # every place looks alike
        each.signals[:] = each.branches[:] = np.log([0.6, 0.2, 0.1])[:, None]
    rates = [allowed_rate(transcripts, costs, width=width) for width in (1, 3)]
    fixed = [
        max(replay(transcripts, Fixed(k, w), costs).tokens_per_second for k in range(1, 6))
        for w in (1, 3)
    ]
    assert rates[0] < rates[1]
    for width, rate, reached in zip((1, 3), rates, fixed, strict=True):
        assert 0.9 * reached < rate < 1.3 * reached
        assert rate < tokens / least_seconds(transcripts, costs, 1, width).sum()
