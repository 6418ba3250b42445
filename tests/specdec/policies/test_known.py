"""Candidates that are known without a draft: what they are taken for, and when they are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from specdec.policies.base import Signal
from specdec.policies.chains import Chain
from specdec.policies.goodput import Goodput
from specdec.policies.known import FIRST_LOOKUPS, REST, KnownChains, in_front, survivals
from specdec.policies.memory import RowMemory
from tests.specdec.policies.worlds import policy_of
from tests.specdec.workloads import (
    StatedGoodput,
    draft_step,
    linear,
    memories,
    outcome,
    round_start,
)

SURE, DOUBTFUL = (8, 9, 9, 1, 0), (4, 3, 5, 1, 0)
"""Evidence: a long context that is always followed so, and a shorter one that is so at times."""


COLUMNS = (Signal.HEAD_BEFORE, Signal.HEAD_AFTER)
"""In which the worlds' estimator finds its probabilities."""


def chain(*evidence: Sequence[float], forced: int = 0) -> Chain:
    return Chain(range(forced + len(evidence)), evidence, forced)


def test_a_chain_stands_in_front_as_far_as_it_brings_more_than_it_hides() -> None:
    assert in_front([0.9, 0.8, 0.1], worth=0.0) == 3
    # 0.9 - 0.1 * 3 = 0.6; 1.7 - 0.2 * 3 = 1.1; 1.8 - 0.9 * 3 < 0
    assert in_front([0.9, 0.8, 0.1], worth=3.0) == 2
    assert in_front([0.5, 0.45], worth=3.0) == 0
    assert in_front([], worth=1.0) == 0
    # Without a draft behind it: 1.8 - 1.5 > 0, and 1.8 - 3 < 0
    assert in_front([0.9, 0.8, 0.1], worth=1.5, draws_behind=False) == 3
    assert in_front([0.9, 0.8, 0.1], worth=3.0, draws_behind=False) == 0
    assert survivals([0.5, 0.5, 1.0]) == [0.5, 0.25, 0.25]


def judged(chains: Sequence[Chain], looked_up: Sequence[tuple[int, int]], rounds: int) -> float:
    """How likely the first candidate is taken to stand after rounds that went so."""
    known, rows = KnownChains(), memories(len(chains))
    for _ in range(rounds):
        start = round_start(rows)
        known.predict(start, chains)
        nothing = [0] * len(chains)
        known.observe(replace(outcome(start, nothing, nothing), looked_up=looked_up))
    return known.predict(round_start(rows), chains)[0][0]


def test_estimates_follow_what_the_target_wrote_and_not_what_was_submitted() -> None:
    first = KnownChains().predict(round_start(memories(1)), [chain(SURE)])[0][0]
    assert judged([chain(SURE)], [(1, 1)], 60) > first > judged([chain(SURE)], [(1, 0)], 60)
    assert judged([chain(forced=1)], [(1, 1)], 400) > 0.98
    assert judged([chain(forced=1)], [(1, 0)], 400) < 0.2


def test_what_is_behind_a_wrong_candidate_is_not_judged() -> None:
    """Three were there, and the target wrote something else in the second place."""
    known, rows = KnownChains(), memories(1)
    start = round_start(rows)
    known.predict(start, [chain(SURE, SURE, SURE, forced=0)])
    known.observe(replace(outcome(start, [0], [0]), looked_up=[(3, 1)]))
    assert known.judged == 2
    assert [stands for _, _, stands in rows[0].judged] == [True, False]


# ------------------------------------------------------------------- goodput, with a draft


def goodput(rate: float, draft: float) -> tuple[StatedGoodput, list[RowMemory]]:
    """It has seen a draft with such an acceptance rate, whose steps cost so much of a target's."""
    policy = policy_of(linear(draft, 0.0), linear(1.0, 0.01))
    rows = memories(4)
    generator = np.random.default_rng(0)
    for _ in range(150):
        start = round_start(rows)
        budget = policy.budget(start)
        most = max(budget)
        for depth in range(1, min(most, 4) + 1):
            drawn = np.full(4, rate)
            policy.go_on(draft_step(range(4), depth, dict.fromkeys(COLUMNS, drawn)))
        drafted = [min(n, 4) for n in budget]
        stood = [int(np.argmin([*(generator.random(n) < rate), False])) for n in drafted]
        policy.observe(outcome(start, drafted, stood, costs=policy.costs))
    return policy, rows


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_a_doubtful_chain_gives_way_to_a_good_draft_only(rate: float) -> None:
    policy, rows = goodput(rate, draft=0.15)
    start = round_start(rows)
    counts = policy.choose(start, [chain(SURE), chain(DOUBTFUL), chain(), chain(forced=3)])
    assert counts[0] == 1 and counts[2] == 0 and counts[3] == 3
    assert counts[1] == (rate == 0.1)
    budget = policy.budget(start)
    assert bool(budget[2]) == (rate == 0.9)


def test_a_draft_that_leaves_rows_with_known_candidates_is_promised_for_the_others_only() -> None:
    """Catches promises that count rows which the draft leaves: they are never kept."""
    promised = {}
    for behind in (True, False):
        policy, rows = goodput(0.9, draft=0.05)
        start = replace(round_start(rows), draws_behind=behind)
        policy.choose(start, [chain(forced=1), chain(), chain(), chain()])
        budget = policy.budget(start)
        assert [n > 0 for n in budget] == [behind, True, True, True]
        promised[behind] = start.notes["promised"] * (4 if behind else 3)
    assert promised[False] < promised[True]


def test_a_chain_gives_way_to_a_draft_that_would_leave_its_row() -> None:
    counts = []
    for behind in (True, False):
        policy, rows = goodput(0.9, draft=0.05)
        start = replace(round_start(rows), draws_behind=behind)
        counts.append(policy.choose(start, [chain(SURE), *[chain()] * 3])[0])
    assert counts == [1, 0]


def test_a_refused_draft_is_asked_again_for_the_rows_that_look_ups_would_take() -> None:
    """Else it would stay off: few rows are left for it, and they pay its steps for all."""
    policy, rows = goodput(0.9, draft=0.05)
    policy.switch.ended(speculated=False, relative=1.0)
    policy.switch.pays(-1.0)  # the last decision: what was left did not pay
    chains = [chain(SURE)] * 3 + [chain()]
    start = replace(round_start(rows), draws_behind=False)
    assert policy.choose(start, chains) == [0] * 4
    assert all(policy.budget(start))
    # While its refusal stands, look-ups have the rows.
    policy.switch.pays(-1.0)
    policy.switch._rested, policy.switch._resting = start.rows, 3
    assert policy.choose(start, chains) == [1, 1, 1, 0]


def test_look_ups_that_leave_a_draft_few_rows_are_no_reason_to_rest() -> None:
    """A step for one row does not pay, and one for all four does."""
    policy, rows = goodput(0.7, draft=0.25)
    policy.switch.ended(speculated=False, relative=1.0)
    start = replace(round_start(rows), draws_behind=False)
    counts = policy.choose(start, [chain(*[SURE] * 6)] * 3 + [chain()])
    assert [n > 3 for n in counts] == [True, True, True, False]
    assert not any(policy.budget(start))
    assert not policy.switch.rests(start)
    later = replace(round_start(rows), draws_behind=False)
    policy.choose(later, [chain()] * 4)
    assert all(policy.budget(later))


def test_look_ups_save_what_they_bring_beyond_the_draft_whose_rows_they_take() -> None:
    saved = []
    for behind in (True, False):
        policy, rows = goodput(0.7, draft=0.25)
        start = replace(round_start(rows), draws_behind=behind)
        policy.choose(start, [chain(*[SURE] * 6)] * 3 + [chain()])
        saved.append(policy._saved)
    assert saved[0] > saved[1] > 0


@pytest.mark.parametrize("seconds", [1e-9, 1e3])
def test_look_ups_that_take_longer_than_they_save_rest(seconds: float) -> None:
    """They come back once they repay their time."""
    policy, rows = goodput(0.1, draft=0.15)

    def looked_up(taken: float) -> bool:
        wanted = policy.wants_lookups()
        chains = [chain(SURE, SURE)] * 4 if wanted else [chain()] * 4
        assert any(policy.choose(round_start(rows), chains)) is wanted
        if wanted:
            Goodput.lookups_took(policy, taken)
        return wanted

    assert all(looked_up(seconds) for _ in range(FIRST_LOOKUPS))
    later = [looked_up(seconds) for _ in range(10 * REST)]
    assert sum(later) == (10 * REST if seconds < 1 else 10 * REST // (REST + 1))
    for _ in range(200 * REST):
        looked_up(1e-9)
    assert all(looked_up(1e-9) for _ in range(REST))


def test_rounds_without_chains_are_those_of_a_policy_that_looks_nothing_up() -> None:
    plain, ours = goodput(0.8, 0.05), goodput(0.8, 0.05)
    for _ in range(5):
        starts = [round_start(rows) for _, rows in (plain, ours)]
        assert list(ours[0].choose(starts[1], [chain()] * 4)) == [0] * 4
        budgets = [
            policy.budget(start) for (policy, _), start in zip((plain, ours), starts, strict=True)
        ]
        assert budgets[0] == budgets[1]
        assert plain[0].price == ours[0].price
        for (policy, _), start in zip((plain, ours), starts, strict=True):
            policy.observe(outcome(start, [0] * 4, [0] * 4, costs=policy.costs))


def test_candidates_of_a_draft_behind_known_ones_are_judged_by_what_reached_them() -> None:
    """Row 0: both known ones stand and one of two drawn; row 1: the known one falls."""
    policy, rows = goodput(0.9, draft=0.05)
    before = [(row.history.judged, row.history.accepted) for row in rows]
    start = round_start(rows)
    policy.choose(start, [chain(SURE, SURE), chain(SURE), chain(), chain()])
    policy.budget(start)
    for depth in (1, 2):
        policy.go_on(draft_step([0, 1], depth, dict.fromkeys(COLUMNS, np.array([0.9] * 2))))
    policy.observe(
        replace(
            outcome(start, [4, 3, 0, 0], [3, 0, 0, 0], costs=policy.costs),
            known=[2, 1, 0, 0],
            looked_up=[(2, 2), (1, 0), (0, 0), (0, 0)],
        )
    )
    kept = rows[0].history.FORGET
    assert rows[0].history.judged == pytest.approx(kept * before[0][0] + 2)
    assert rows[0].history.accepted == pytest.approx(kept * before[0][1] + 1)
    assert (rows[1].history.judged, rows[1].history.accepted) == before[1]
    assert (rows[0].found.judged, rows[1].found.judged, rows[1].found.accepted) == (2, 1, 0)
