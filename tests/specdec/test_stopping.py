from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.stopping import (
    POLICIES,
    Confidence,
    DraftStep,
    Fixed,
    Heuristic,
    RoundOutcome,
    RowMemory,
    StopPolicy,
    make_policy,
)


def memories(n: int) -> list[RowMemory]:
    return [RowMemory() for _ in range(n)]


def step(probabilities: list[list[float]], tokens: list[int], depth: int = 1) -> DraftStep:
    logits = torch.tensor(probabilities).log() + 3.0  # logits are free up to a constant
    rows = range(len(tokens))
    return DraftStep(rows, depth, torch.tensor(tokens), logits, torch.zeros(len(tokens), 4))


def flags(answer: Tensor | None) -> list[bool]:
    assert answer is not None
    return answer.tolist()


def test_none_drafts_nothing() -> None:
    policy = make_policy("none")
    assert policy.budget(memories(3)) == [0, 0, 0]


def test_fixed_gives_every_row_k_whatever_happened() -> None:
    policy, rows = Fixed(5), memories(2)
    policy.observe(RoundOutcome(rows, [5, 5], [5, 5], [0, 5]))
    assert policy.budget(rows) == [5, 5]
    assert policy.go_on(step([[0.5, 0.5]], [0])) is None


@pytest.mark.parametrize("policy", [Fixed(4), Heuristic(), Confidence(), StopPolicy()], ids=str)
def test_the_policies_submit_what_they_drafted(policy: StopPolicy) -> None:
    assert list(policy.submit(memories(3), [4, 0, 2])) == [4, 0, 2]


def test_heuristic_grows_by_two_and_shrinks_by_one_row_by_row() -> None:
    policy, rows = Heuristic(k=4, k_min=1, k_max=7), memories(3)
    assert policy.budget(rows) == [4, 4, 4]
    policy.observe(RoundOutcome(rows, [4, 4, 4], [4, 4, 4], [4, 3, 0]))
    assert policy.budget(rows) == [6, 3, 3]
    policy.observe(RoundOutcome(rows, [6, 3, 3], [6, 3, 3], [6, 3, 2]))
    assert policy.budget(rows) == [7, 5, 2]


def test_heuristic_stays_within_its_limits() -> None:
    policy, rows = Heuristic(k=2, k_min=1, k_max=3), memories(2)
    for _ in range(4):
        k = policy.budget(rows)
        policy.observe(RoundOutcome(rows, k, k, [k[0], 0]))
    assert policy.budget(rows) == [3, 1]


def test_heuristic_learns_nothing_from_a_round_that_verified_nothing() -> None:
    policy, rows = Heuristic(k=4), memories(1)
    policy.observe(RoundOutcome(rows, [0], [0], [0]))
    assert policy.budget(rows) == [4]


def test_heuristic_judges_a_cut_budget_by_what_was_submitted() -> None:
    """Near its end a row drafts less than k; accepting all of that counts as full acceptance."""
    policy, rows = Heuristic(k=4), memories(1)
    policy.observe(RoundOutcome(rows, [2], [2], [2]))
    assert policy.budget(rows) == [6]


def test_confidence_stops_after_an_unlikely_candidate() -> None:
    policy = Confidence(threshold=0.4, k_max=9)
    assert policy.budget(memories(2)) == [9, 9]
    drawn = step([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.05, 0.9, 0.05]], [0, 1, 1])
    assert flags(policy.go_on(drawn)) == [True, False, True]


def test_confidence_is_the_drafts_own_before_temperature() -> None:
    """DraftStep carries raw logits; a candidate drawn against the odds is still unlikely."""
    certain = torch.tensor([[50.0, 0.0]])
    for token, on in ((0, True), (1, False)):
        drawn = DraftStep([0], 1, torch.tensor([token]), certain, torch.zeros(1, 4))
        assert flags(Confidence(0.4).go_on(drawn)) == [on]


def test_confidence_works_in_half_precision() -> None:
    logits = torch.tensor([[2.0, 0.0]], dtype=torch.bfloat16)
    drawn = DraftStep([0], 1, torch.tensor([0]), logits, torch.zeros(1, 4))
    assert flags(Confidence(0.85).go_on(drawn)) == [True]  # 0.8808
    assert flags(Confidence(0.90).go_on(drawn)) == [False]


def test_every_policy_can_be_made_by_name() -> None:
    made = {name: make_policy(name, k=3, k_min=2, k_max=8, threshold=0.7) for name in POLICIES}
    assert made["fixed"] == Fixed(3)
    assert made["heuristic"] == Heuristic(3, 2, 8)
    assert made["confidence"] == Confidence(0.7, 8)
    assert type(made["none"]) is StopPolicy


def test_an_unknown_policy_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"greedily.*none, fixed, heuristic, confidence"):
        make_policy("greedily")
