"""Trees of `goodput`: what may decide about a node, the best set of them, what is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations

import numpy as np
import pytest

from specdec.measure.calibration import Array, Flags
from specdec.policies import growing as growing_
from specdec.policies.base import DraftStep, RoundOutcome, Signal
from specdec.policies.costs import CostModel
from specdec.policies.estimators import online_estimator
from specdec.policies.forest import NONE, Forest
from specdec.policies.goodput import Goodput
from specdec.policies.kinds import Kind, Kinds
from specdec.policies.objective import best_number
from tests.specdec.workloads import draft_step, linear, memories, outcome, round_start, staircase

ROWS, WIDTH, DEPTH = 3, 3, 3


@pytest.fixture(autouse=True)
def room_for_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees although places in the verification cost something."""
    monkeypatch.setattr(growing_, "MOST_OF_SECOND", 0.3)


class Always(Kinds):
    """Rounds of trees where these are possible, whatever they bring."""

    def choose(self, rows: int, possible: Sequence[Kind]) -> Kind:
        return possible[-1]


def growing(costs: CostModel | None = None, policy: type[Goodput] = Goodput) -> Goodput:
    """A policy that has tried speculation, and grows trees."""
    costs = costs or CostModel(linear(0.02, 0.0), linear(1.0, 0.045))
    made = policy(online_estimator("confidence"), None, costs, k_max=DEPTH, width=WIDTH)
    made.kinds, made.floor = Always(), 0.0
    # What better siblings left of the draft's probability tells much, and so does a child's share.
    made.siblings._weights = [[1.0, 0.0, 1.0, 0.0, 0.0, -0.5, 0.0], [0.5, 1.0, 0.5, 0, 0, -0.3, 0]]
    made._judged, made._accepted = 500.0, 350.0
    return made


def signals_of(seed: int, depth: int, at: Sequence[tuple[int, int]]) -> Array:
    """What the draft says of WIDTH children of nodes (row, node): the same for the same nodes."""
    found = []
    for row, node in at:
        chance = np.random.default_rng([seed, depth, row, node + 1])
        q = np.sort(chance.dirichlet([0.7] * 6))[::-1][:WIDTH]
        each = np.zeros((WIDTH, len(Signal)))
        each[:, Signal.LOG_Q] = np.log(q + 1e-6)
        each[:, Signal.LOG_TOP] = np.log(q[0] + 1e-6)
        each[:, Signal.ENTROPY] = -(q * np.log(q + 1e-6)).sum()
        found.append(each)
    return np.concatenate(found)


def grown(
    policy: Goodput, seed: int, *, free: bool, redrawn: tuple[int, int] | None = None
) -> list[tuple[DraftStep, Flags]]:
    """A round: its draft steps, and what was kept of each.

    Args:
        redrawn: a depth and a rank; all children of this rank and the worse ones are others then.
    """
    start = replace(round_start(memories(ROWS), free_trimming=free), nodes=[20] * ROWS)
    budget = policy.budget(start)
    assert policy.branches
    frontier, sizes = [(row, NONE) for row in range(ROWS) if budget[row]], [0] * ROWS
    steps = []
    for depth in range(1, DEPTH + 1):
        if not frontier:
            break
        signals = signals_of(seed, depth, frontier)
        ranks = np.tile(np.arange(WIDTH), len(frontier))
        if redrawn and redrawn[0] == depth:
            others = signals_of(seed + 1000, depth, frontier)
            signals[:, Signal.LOG_Q] = np.where(
                ranks >= redrawn[1], others[:, Signal.LOG_Q], signals[:, Signal.LOG_Q]
            )
        rows, parents = (np.repeat([each[i] for each in frontier], WIDTH) for i in (0, 1))
        step = DraftStep(rows, depth, signals, parents, ranks)
        kept = policy.keep(step)
        going = kept & policy.go_on(step)
        steps.append((step, kept))
        frontier = []
        for row, keeps, goes in zip(rows.tolist(), kept.tolist(), going.tolist(), strict=True):
            if keeps:
                if goes and depth < DEPTH:
                    frontier.append((row, sizes[row]))
                sizes[row] += 1
    return steps


def parents_of(steps: Sequence[tuple[DraftStep, Flags]]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(ROWS)]
    for step, kept in steps:
        assert step.parents is not None
        for row, parent in zip(step.rows[kept].tolist(), step.parents[kept].tolist(), strict=True):
            found[row].append(parent)
    return found


# ------------------------------------------------------- the invariant of rejection sampling


class KnowsAll(Goodput):
    """A mutant: it keeps by what children are."""

    def keep(self, step: DraftStep) -> Flags:
        assert self.forest is not None
        judge = self.forest.judge

        def judged(*args):  # type: ignore[no-untyped-def]
            children = judge(*args)
            children.worth = children.survival
            return children

        self.forest.judge = judged  # type: ignore[method-assign]
        return super().keep(step)


class AllRanks(Goodput):
    """A mutant: it decides about all ranks at once, so that the worse ones say of the better."""

    def keep(self, step: DraftStep) -> Flags:
        assert self.forest is not None and self.costs is not None and step.ranks is not None
        children = self.forest.judge(step, self.estimator, self.siblings)
        order = self.forest.fitting(np.arange(len(step.rows)))
        seconds = self.costs.verify.curve(ROWS, ROWS + len(order))
        return self.forest.keep(order[: best_number(children.worth[order], seconds, self.price)])


STAIRS = CostModel(linear(0.02, 0.0), staircase(7, 0.1))
"""Whether one more child is worth it depends on what others are beside it."""


def depends(policy: type[Goodput], rank: int, depth: int) -> bool:
    """Whether what is kept of a rank, of better ones, or before, depends on the rank's children."""
    for seed in range(24):
        first, second = (
            grown(growing(STAIRS, policy), seed, free=False, redrawn=redrawn)
            for redrawn in (None, (depth, rank))
        )
        for (step, kept), (_, others) in zip(first[:depth], second[:depth], strict=False):
            assert step.ranks is not None
            of = (step.ranks <= rank) | (step.depth < depth)
            if (kept[of] != others[of]).any():
                return True
    return False


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("rank", range(WIDTH))
def test_whether_a_node_is_kept_does_not_depend_on_it(rank: int, depth: int) -> None:
    """Redraw the children of a rank and the worse ones: no decision about the rank may change."""
    assert not depends(Goodput, rank, depth)


def test_some_children_are_kept_and_others_are_not() -> None:
    """Else the invariant would hold of itself."""
    rounds = [grown(growing(STAIRS), seed, free=False) for seed in range(24)]
    second, third = (
        np.mean([each[rank::WIDTH].mean() for steps in rounds for _, each in steps])
        for rank in (1, 2)
    )
    assert 0.1 < second < 0.9
    assert third > 0.02


@pytest.mark.parametrize("mutant", [KnowsAll, AllRanks])
def test_a_policy_that_looks_is_caught(mutant: type[Goodput]) -> None:
    assert any(depends(mutant, rank, 1) for rank in range(WIDTH))


def test_under_rejection_nothing_is_pruned() -> None:
    policy = growing()
    parents = parents_of(grown(policy, 3, free=False))
    assert [[*each] for each in policy.prune(parents)] == [[*range(len(each))] for each in parents]


def test_better_siblings_do_tell() -> None:
    """What they left of the draft's probability says whether a second child is worth a place."""
    assert depends(Goodput, 0, 1) is False
    for seed in range(24):
        one, two = (grown(growing(), seed, free=False, redrawn=each) for each in (None, (1, 0)))
        if (one[0][1] != two[0][1])[1::WIDTH].any():
            return
    raise AssertionError("second children are kept alike whatever the first are")


# ------------------------------------------------------------------------------- the best set


@pytest.mark.parametrize("seed", range(4))
def test_where_nodes_may_be_dropped_the_best_set_is_verified(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against all sets that are trees, by brute force."""
    monkeypatch.setattr(growing_, "MOST_OF_SECOND", 9.0)  # trees, although places cost much
    policy = growing(CostModel(linear(0.3, 0.0), staircase(4, 0.5)))
    parents = parents_of(grown(policy, seed, free=True))
    forest, costs = policy.forest, policy.costs
    assert forest is not None and costs is not None
    nodes = [(row, node) for row, each in enumerate(parents) for node in range(len(each))]
    assert 3 < len(nodes) < 14
    survival = {
        each: forest.expected([[each[1]] * (row == each[0]) for row in range(ROWS)])
        for each in nodes
    }

    def gain(chosen: Sequence[tuple[int, int]]) -> float:
        seconds = costs.verify(ROWS + len(chosen)) - costs.verify(ROWS)
        return sum(survival[each] for each in chosen) - policy.price * float(seconds)

    sets = chain.from_iterable(combinations(nodes, n) for n in range(len(nodes) + 1))
    trees = (
        each
        for each in sets
        if all(parents[row][node] < 0 or (row, parents[row][node]) in each for row, node in each)
    )
    kept = [(row, node) for row, each in enumerate(policy.prune(parents)) for node in each]
    assert gain(kept) == pytest.approx(max(map(gain, trees)))


def test_a_row_has_no_more_nodes_than_places() -> None:
    for free in (False, True):
        policy = growing(CostModel(linear(1e-6, 0.0), linear(1.0, 0.0)))
        parents = parents_of(grown(policy, 5, free=free))
        assert max(map(len, parents)) == 20
        assert max(map(len, policy.prune(parents))) == 20


def test_the_floor_is_what_the_last_place_was_worth() -> None:
    """Where there is room for so many, and places beyond cost much."""
    policy = growing(CostModel(linear(1e-3, 0.0), staircase(12, 5.0)))
    for seed in range(30):
        parents = parents_of(grown(policy, seed, free=True))
        kept = policy.prune(parents)
        assert sum(map(len, kept)) <= 12 - ROWS
    forest = policy.forest
    assert forest is not None
    worth = forest.drawn()[2]
    assert policy.floor == pytest.approx(worth[12 - ROWS - 1], abs=0.15)


def test_it_explains_each_node() -> None:
    policy = growing()
    parents = parents_of(grown(policy, 1, free=True))
    for row in range(ROWS):
        why = policy.explain(row)
        assert len(why.predicted) == len(parents[row])
        assert why.reason.startswith(f"{len(parents[row])} nodes: no other is worth")


def test_where_places_cost_too_much_no_tree_is_tried() -> None:
    for token, branches in ((0.01, True), (1.0, False)):
        policy = growing(CostModel(linear(0.02, 0.0), linear(1.0, token)))
        policy.budget(replace(round_start(memories(ROWS)), nodes=[20] * ROWS))
        assert policy.branches is branches


# ----------------------------------------------------------------------------------- learning


def test_judged_are_the_children_of_accepted_nodes_up_to_the_one_that_stands() -> None:
    forest = Forest([0.7], [9], free=True)
    policy = growing()
    start = replace(round_start(memories(1)), nodes=[9])
    start.notes["forest"] = forest
    for depth, parents in enumerate(([NONE], [0, 1]), start=1):
        at = [(0, parent) for parent in parents]
        ranks = np.tile(np.arange(WIDTH), len(at))
        rows, of = np.zeros(len(ranks), dtype=int), np.repeat(parents, WIDTH)
        step = DraftStep(rows, depth, signals_of(0, depth, at), of, ranks)
        forest.judge(step, policy.estimator, policy.siblings)
        forest.keep(np.arange(len(ranks)) if depth == 1 else np.arange(len(ranks) - 1))
    learnt: dict[str, list[tuple[int, list[bool]]]] = {"first": [], "others": []}
    for name, estimator in (("first", policy.estimator), ("others", policy.siblings)):
        estimator.learn = lambda seen, typical, stood, name=name: learnt[name].append(  # type: ignore[method-assign]
            (len(seen), stood.tolist())
        )
    # Nodes 0, 1, 2 follow the root; 3, 4, 5 follow 0; 6, 7 follow 1. Node 1 stands, and 7.
    parents = [[-1, -1, -1, 0, 0, 0, 1, 1]]
    kept, path = [[*range(8)]], [[1, 7]]
    policy.observe(
        RoundOutcome(start, [8], [8], [2], [], (9, 0.0), parents=parents, kept=kept, path=path)
    )
    assert learnt["first"] == [(1, [False]), (1, [False])]
    assert learnt["others"] == [(1, [True]), (1, [True])]
    assert start.rows[0].history.judged == 2
    assert start.rows[0].history.accepted == 0


@pytest.mark.parametrize(("read", "measured"), [(ROWS, True), (4000, False)])
def test_rounds_that_mostly_read_prompts_say_nothing_of_their_kind(
    read: int, measured: bool
) -> None:
    costs = CostModel(linear(0.02, 0.01), linear(1.0, 0.005))
    policy = Goodput(online_estimator("confidence"), None, costs, k_max=DEPTH, width=WIDTH)
    policy.switch.pays = lambda _: True  # type: ignore[method-assign]
    start = replace(round_start(memories(ROWS)), nodes=[20] * ROWS)
    budget = policy.budget(start)
    policy.go_on(draft_step(range(ROWS), 1, {Signal.LOG_Q: [-0.1] * ROWS}))
    drafted = policy.submit([1] * ROWS)
    spent = [(read, float(costs.draft(read)))]
    policy.observe(replace(outcome(start, drafted, [0] * ROWS, costs=costs), draft_costs=spent))
    assert min(budget) > 0
    known = policy.kinds._sizes[ROWS.bit_length()].kinds
    assert (known[Kind()].rounds == 1) is measured
