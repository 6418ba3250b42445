from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.policies.base import DraftStep, Signal
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.objective import AHEAD, best_tree, further_seconds, leading_rows
from specdec.policies.simple import Fixed
from tests.specdec.policies.worlds import (
    FREE,
    drafted,
    policy_of,
)
from tests.specdec.workloads import (
    linear,
    staircase,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.lists(st.floats(0.02, 0.98), min_size=3, max_size=3), min_size=1, max_size=3),
    rises=st.lists(st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.3, 1.0]), min_size=6, max_size=6),
)
def test_the_verified_set_is_the_best_of_all_prefix_closed_ones(
    steps: list[list[float]], rises: list[float]
) -> None:
    """Against brute force over every number of candidates of every row.

    Tokens 4 to 6 cost no more than 3 do, so that the first round always speculates with some rows.
    """
    seconds = [1.0] * 6 + list(1 + np.cumsum(rises))
    verify = CostTable(range(1, 13), seconds)
    policy = policy_of(FREE, verify)
    each = drafted(policy, steps)
    survival = np.cumprod(np.array(steps), 0)

    def gain(ks: Sequence[int]) -> float:
        tokens = sum(float(survival[:k, row].sum()) for row, k in enumerate(ks))
        return tokens - policy.price * float(verify(3 + sum(ks)))

    submitted = policy.submit(each)
    best = max(gain(ks) for ks in product(*(range(n + 1) for n in each)))
    assert any(each)
    assert gain(submitted) == pytest.approx(best)
    assert all(0 <= k <= n for k, n in zip(submitted, each, strict=True))


def test_a_step_that_is_paid_for_is_filled_with_whatever_there_is() -> None:
    """8 tokens cost what 4 do: unlikely candidates ride along, the 9th would cost a jump."""
    policy = policy_of(FREE, staircase(8, rise=1.0))
    each = drafted(policy, [[0.3, 0.2, 0.1, 0.05], [0.5, 0.5, 0.5, 0.5]])
    assert sum(policy.submit(each)) == 4
    policy = policy_of(FREE, staircase(8, rise=1.0))
    assert policy.submit(drafted(policy, [[0.3, 0.2, 0.1, 0.05]])) == [1, 1, 1, 1]


@pytest.mark.parametrize(("rise", "verified"), [(0.15, 8), (0.25, 4)])
def test_a_jump_is_taken_when_what_lies_behind_it_repays_it(rise: float, verified: int) -> None:
    """4 rows at 7.6 and 7.0 tokens a second: rises of 1.1 and 1.7, against 4 candidates of 0.36.

    One candidate behind the jump never repays it: a search that goes uphill step by step stops.
    """
    policy = policy_of(FREE, staircase(8, rise, most=12))
    each = drafted(policy, [[0.6] * 4, [0.6] * 4])
    assert sum(policy.submit(each)) == verified


def test_likelier_candidates_go_first_whatever_their_row() -> None:
    policy = policy_of(FREE, staircase(8, rise=9.0))
    each = drafted(policy, [[0.9, 0.5, 0.4, 0.1], [0.9, 0.5, 0.9, 0.9], [0.9, 0.1, 0.1, 0.1]])
    assert policy.submit(each) == [3, 1, 0, 0]  # 0.9 0.81 0.729 | 0.5 | 0.4 is the fifth


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rates=st.lists(st.floats(0.02, 0.98), min_size=3, max_size=3),
    expected=st.lists(st.floats(0.02, 0.98), min_size=3, max_size=3),
    price=st.floats(0.1, 5.0),
    steps=st.integers(1, AHEAD + 2),
    share=st.sampled_from([0.5, 1.0]),
)
def test_leading_rows_are_the_best_of_all_numbers_and_steps(
    rates: list[float], expected: list[float], price: float, steps: int, share: float
) -> None:
    """Against the definition, written out: j rows draft m candidates each."""
    costs, fed = CostModel(linear(0.05, 0.01), staircase(4, 0.3)), 3
    expected.sort(reverse=True)
    first = [0.05, 0.06, 0.08]
    further = further_seconds(costs, fed, 3, share)

    def gain(j: int, m: int) -> float:
        rows = zip(rates[:j], expected[:j], strict=True)
        tokens = sum(hope * sum(rate**i for i in range(m)) for rate, hope in rows)
        verify = costs.verify(fed + int(np.rint(share * j * m))) - costs.verify(fed)
        return float(tokens - price * (first[j - 1] + (m - 1) * costs.draft(j) + verify))

    number, length, most = leading_rows(rates, expected, first, further, price, steps)
    every = {j: max(gain(j, m) for m in range(1, min(steps, AHEAD) + 1)) for j in (1, 2, 3)}
    assert most == pytest.approx(max(every.values()))
    assert every[number] == pytest.approx(most)
    assert gain(number, length) == pytest.approx(most)


@pytest.mark.parametrize(("price", "most"), [(0.05, 8), (0.6, 8), (0.6, 2), (3.0, 8)])
def test_the_best_tree_is_the_best_of_all_depths(price: float, most: int) -> None:
    """Against trees that `fixed` grows, node by node."""
    costs, rows, fed = CostModel(linear(0.02, 0.01), staircase(8, 0.3)), 2, 3
    stands = 0.7, 0.3 * 0.4  # a first child, and a second one, of an accepted node
    gains = []
    for depth in range(1, most + 1):
        policy, frontier = Fixed(depth, 2), [(-1, 1.0)]
        tokens = drafting = 0.0
        nodes = 0
        for level in range(1, depth + 1):
            drafting += float(costs.draft(rows * len(frontier)))
            parents = np.repeat([node for node, _ in frontier], 2)
            ranks = np.tile([0, 1], len(frontier))
            signals = np.zeros((len(ranks), len(Signal)))
            kept = policy.keep(DraftStep(0 * ranks, level, signals, parents, ranks))
            reached = np.repeat([each for _, each in frontier], 2) * np.array(stands)[ranks]
            frontier = [*zip(range(nodes, nodes + kept.sum()), reached[kept], strict=True)]
            nodes, tokens = nodes + int(kept.sum()), tokens + rows * float(reached[kept].sum())
        verifying = float(costs.verify(fed + rows * nodes) - costs.verify(fed))
        gains.append(tokens - price * (drafting + verifying))
    depth, gain = best_tree(costs, fed, rows, (0.7, 0.4), price, most)
    assert gain == pytest.approx(max(gains))
    assert depth == gains.index(max(gains)) + 1
