from __future__ import annotations

import numpy as np
import pytest

from specdec.policies.base import Signal
from specdec.policies.estimating import Confidence, Entropy, HeadPolicy
from specdec.policies.estimators import online_estimator
from tests.specdec.workloads import Known, draft_step, memories, outcome, round_start


def test_confidence_stops_after_an_unlikely_candidate() -> None:
    policy = Confidence(threshold=0.4, k_max=9)
    assert policy.budget(round_start(memories(2))) == [9, 9]
    drawn = draft_step([0, 1, 2], 1, {Signal.LOG_Q: np.log([0.5, 0.3, 0.9])})
    assert policy.go_on(drawn).tolist() == [True, False, True]


def test_entropy_stops_where_the_draft_is_unsure() -> None:
    """1 - sqrt(0.2 H) at H = 0, ln 2, 2: 1, 0.628, 0.368."""
    drawn = draft_step([0, 1, 2], 1, {Signal.ENTROPY: [0.0, np.log(2), 2.0]})
    assert Entropy(0.4).go_on(drawn).tolist() == [True, True, False]
    assert Entropy(0.62).go_on(drawn).tolist() == [True, True, False]
    assert Entropy(0.63).go_on(drawn).tolist() == [True, False, False]
    assert Entropy(0.4, k_max=7).budget(round_start(memories(2))) == [7, 7]


# ------------------------------------------------------------------- policies that estimate


def test_head_stops_once_some_rejection_is_likely_enough() -> None:
    """P(some rejected) = 1 - 0.8 0.8 = 0.36, then 1 - 0.8^3 = 0.488."""
    policy = HeadPolicy(Known(), threshold=0.4, k_min=1, k_max=9)
    assert policy.budget(round_start(memories(2))) == [9, 9]
    for depth, on in ((1, True), (2, True), (3, False)):
        drawn = draft_step([0, 1], depth, {Signal.HEAD_AFTER: [0.8, 0.99]})
        assert policy.go_on(drawn).tolist() == [on, True]


def test_head_drafts_k_min_whatever_it_thinks() -> None:
    policy = HeadPolicy(Known(), threshold=0.4, k_min=3, k_max=9)
    policy.budget(round_start(memories(1)))
    hopeless = {Signal.HEAD_AFTER: [0.01]}
    flags = [policy.go_on(draft_step([0], depth, hopeless)).item() for depth in (1, 2, 3)]
    assert flags == [True, True, False]


def test_head_starts_every_round_afresh() -> None:
    policy, start = HeadPolicy(Known(), threshold=0.4, k_min=1), round_start(memories(1))
    for _ in range(2):
        policy.budget(start)
        assert not policy.go_on(draft_step([0], 1, {Signal.HEAD_AFTER: [0.3]})).item()
        policy.budget(start)
        assert policy.go_on(draft_step([0], 1, {Signal.HEAD_AFTER: [0.7]})).item()


def drafted_round(policy: HeadPolicy) -> None:
    """Three candidates for row 0, two for row 1, one for row 2."""
    for depth, alive in ((1, [0, 1, 2]), (2, [0, 1]), (3, [0])):
        after = [0.9 - 0.1 * row - 0.01 * depth for row in alive]
        policy.go_on(draft_step(alive, depth, {Signal.HEAD_AFTER: after}))


def test_the_estimator_learns_from_judged_candidates_only() -> None:
    """Row 0: y_1 stands, y_2 falls, y_3 was never judged. Row 1: both stand. Row 2: trimmed.

    What was trimmed counts for its row's rate as it was predicted.
    """
    estimator = Known()
    policy, start = HeadPolicy(estimator), round_start(memories(3))
    policy.budget(start)
    drafted_round(policy)
    policy.observe(outcome(start, [3, 2, 1], [1, 2, 0], submitted=[3, 2, 0]))
    ((signals, typical, accepted),) = estimator.seen
    judged = dict(zip(signals[:, Signal.HEAD_AFTER].round(2).tolist(), accepted, strict=True))
    assert judged == {0.89: True, 0.88: False, 0.79: True, 0.78: True}
    assert typical.tolist() == [0.6] * 4
    history = [(r.history.judged, r.history.accepted) for r in start.rows]
    assert history == [(2, 1), (2, 2), (1, pytest.approx(0.69))]


def test_a_candidate_trimmed_after_the_accepted_prefix_was_not_judged() -> None:
    estimator = Known()
    policy, start = HeadPolicy(estimator), round_start(memories(3))
    policy.budget(start)
    drafted_round(policy)
    policy.observe(outcome(start, [3, 2, 1], [2, 0, 0], submitted=[2, 0, 0]))
    ((signals, _, accepted),) = estimator.seen
    assert signals[:, Signal.HEAD_AFTER].round(2).tolist() == [0.89, 0.88]
    assert accepted.all()


def test_judged_candidates_enter_the_rows_calibration_by_context_length() -> None:
    policy, rows = HeadPolicy(Known()), memories(3)
    start = round_start(rows, contexts=[100, 129, 5000])
    policy.budget(start)
    drafted_round(policy)
    policy.observe(outcome(start, [3, 2, 1], [1, 2, 0]))
    first, second, third = (row.calibration() for row in rows)
    assert (set(first), set(second), set(third)) == ({128}, {256}, {8192})
    counts, predicted, stood = first[128].bins.sum(0)
    assert (counts, stood) == (2, 1) and predicted == pytest.approx(0.89 + 0.88)
    assert third[8192].judged == 1 and third[8192].bins[:, 2].sum() == 0


def test_a_row_is_expected_to_go_on_as_it_did() -> None:
    """At first as the pair does, then more and more as the row itself."""
    policy, rows = HeadPolicy(Known()), memories(2)
    start = round_start(rows)
    for _ in range(40):
        policy.budget(start)
        policy.go_on(draft_step([0, 1], 1, {Signal.HEAD_AFTER: [0.5, 0.5]}))
        policy.observe(outcome(start, [1, 1], [1, 0]))
    policy.budget(start)
    easy, hard = policy.typical
    assert easy > 0.7 and hard < 0.3
    policy.budget(round_start([*rows, *memories(1)]))
    assert policy.typical[2] == pytest.approx(0.5, abs=0.05)  # the pair's


def test_a_round_without_candidates_teaches_nothing() -> None:
    estimator = Known()
    policy, start = HeadPolicy(estimator), round_start(memories(2))
    policy.budget(start)
    policy.observe(outcome(start, [0, 0], [0, 0]))
    assert not estimator.seen and start.rows[0].calibration() == {}


def test_explanations_name_the_candidates_predictions_and_the_threshold() -> None:
    policy, start = HeadPolicy(Known(), threshold=0.55), round_start(memories(3))
    policy.budget(start)
    drafted_round(policy)
    why = policy.explain(1)
    assert why.predicted == pytest.approx((0.79, 0.78))
    assert "0.38" in why.reason and "0.55" in why.reason  # 1 - 0.79 * 0.78


@pytest.mark.parametrize("name", ["confidence", "entropy"])
def test_any_estimator_serves_head(name: str) -> None:
    policy = HeadPolicy(online_estimator(name), threshold=0.7, k_min=1)
    policy.budget(round_start(memories(1)))
    certain = {Signal.LOG_Q: [0.0], Signal.LOG_TOP: [0.0], Signal.ENTROPY: [0.0]}
    unsure = {Signal.LOG_Q: [-5.0], Signal.LOG_TOP: [-3.0], Signal.ENTROPY: [3.0]}
    assert policy.go_on(draft_step([0], 1, certain)).item()
    assert not policy.go_on(draft_step([0], 2, unsure)).item()
