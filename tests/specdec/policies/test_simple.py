from __future__ import annotations

import pytest

from specdec.policies.base import StopPolicy
from specdec.policies.estimating import Confidence, Entropy
from specdec.policies.simple import Fixed, Heuristic
from tests.specdec.workloads import draft_step, memories, outcome, round_start


def test_none_drafts_nothing() -> None:
    assert StopPolicy().budget(round_start(memories(3))) == [0, 0, 0]


def test_fixed_gives_every_row_k_whatever_happened() -> None:
    policy, start = Fixed(5), round_start(memories(2))
    policy.observe(outcome(start, [5, 5], [0, 5]))
    assert policy.budget(start) == [5, 5]
    assert policy.go_on(draft_step([0, 1], 1, {})).tolist() == [True, True]


@pytest.mark.parametrize(
    "policy", [Fixed(4), Heuristic(), StopPolicy()], ids=lambda policy: type(policy).__name__
)
def test_policies_that_look_at_no_candidate_never_make_the_host_wait(policy: StopPolicy) -> None:
    assert not policy.wanted


@pytest.mark.parametrize(
    "policy",
    [Fixed(4), Heuristic(), Confidence(), Entropy(), StopPolicy()],
    ids=lambda policy: type(policy).__name__,
)
def test_the_policies_submit_what_they_drafted(policy: StopPolicy) -> None:
    assert list(policy.submit([4, 0, 2])) == [4, 0, 2]


def test_heuristic_grows_by_two_and_shrinks_by_one_row_by_row() -> None:
    policy, start = Heuristic(k=4, k_min=1, k_max=7), round_start(memories(3))
    assert policy.budget(start) == [4, 4, 4]
    policy.observe(outcome(start, [4, 4, 4], [4, 3, 0]))
    assert policy.budget(start) == [6, 3, 3]
    policy.observe(outcome(start, [6, 3, 3], [6, 3, 2]))
    assert policy.budget(start) == [7, 5, 2]


def test_heuristic_stays_within_its_limits() -> None:
    policy, start = Heuristic(k=2, k_min=1, k_max=3), round_start(memories(2))
    for _ in range(4):
        k = policy.budget(start)
        policy.observe(outcome(start, k, [k[0], 0]))
    assert policy.budget(start) == [3, 1]


def test_heuristic_begins_within_its_limits() -> None:
    assert Heuristic(k=4, k_max=2).budget(round_start(memories(1))) == [2]
    assert Heuristic(k=1, k_min=3).budget(round_start(memories(1))) == [3]


def test_heuristic_learns_nothing_from_a_round_that_verified_nothing() -> None:
    policy, start = Heuristic(k=4), round_start(memories(1))
    policy.observe(outcome(start, [0], [0]))
    assert policy.budget(start) == [4]


def test_heuristic_judges_a_cut_budget_by_what_was_submitted() -> None:
    """Near its end a row drafts less than k; accepting all of that counts as full acceptance."""
    policy, start = Heuristic(k=4), round_start(memories(1))
    policy.observe(outcome(start, [2], [2]))
    assert policy.budget(start) == [6]
