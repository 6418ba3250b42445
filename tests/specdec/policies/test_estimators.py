from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from specdec.measure.calibration import Array, Flags
from specdec.policies.base import Signal
from specdec.policies.estimators import (
    ONLINE,
    Estimator,
    HeadEstimator,
    log_odds,
    online_estimator,
)
from specdec.policies.signals import read_signals
from tests.specdec.workloads import random_head


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def test_what_is_known_before_the_draw_does_not_depend_on_the_candidate() -> None:
    """The invariant of rejection sampling rests on it."""
    head = random_head(8)
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(1)).expand(9, -1)
    hidden = torch.randn(1, 8, generator=torch.Generator().manual_seed(2)).expand(9, -1)
    signals = read_signals(logits, torch.arange(9), hidden, frozenset(Signal), head)
    for column in (Signal.LOG_TOP, Signal.ENTROPY, Signal.HEAD_BEFORE):
        assert len(set(signals[:, column].tolist())) == 1
    for column in (Signal.LOG_Q, Signal.HEAD_AFTER):
        assert len(set(signals[:, column].tolist())) == 9
    host, typical = signals.double().numpy(), np.full(9, 0.6)
    for estimator in estimators().values():
        before, after = estimator.predict(host, typical)
        assert len(set(before.tolist())) == 1 and len(set(after.tolist())) == 9


# ---------------------------------------------------------------------------- estimators


def estimators() -> dict[str, Estimator]:
    return {**{name: online_estimator(name) for name in ONLINE}, "head": HeadEstimator()}


def world(n: int, seed: int = 0) -> tuple[Array, Array]:
    """Signals as a draft might give them, and the rates of the rows they come from."""
    random = np.random.default_rng(seed)
    signals = np.zeros((n, len(Signal)))
    signals[:, Signal.LOG_TOP] = -random.exponential(0.7, n)
    signals[:, Signal.LOG_Q] = signals[:, Signal.LOG_TOP] - random.exponential(0.5, n)
    signals[:, Signal.ENTROPY] = random.exponential(1.0, n)
    signals[:, Signal.HEAD_BEFORE] = random.normal(0.5, 1.5, n)
    signals[:, Signal.HEAD_AFTER] = signals[:, Signal.HEAD_BEFORE] + random.normal(0, 0.5, n)
    return signals, random.uniform(0.3, 0.9, n)


def log_loss(p: Array, accepted: Flags) -> float:
    return float(-np.log(np.where(accepted, p, 1 - p)).mean())


@pytest.mark.parametrize("name", [*ONLINE, "head"])
def test_every_estimator_does_what_the_protocol_says(name: str) -> None:
    estimator = estimators()[name]
    assert estimator.wanted <= set(Signal)
    signals, typical = world(200)
    for _ in range(3):
        for p in estimator.predict(signals, typical):
            assert p.shape == (200,) and ((p > 0) & (p < 1)).all()
        estimator.learn(signals, typical, np.arange(200) % 3 > 0)
    # Nothing else than the wanted columns is looked at.
    blind = np.where([column in estimator.wanted for column in Signal], signals, np.nan)
    for p, q in zip(
        estimator.predict(signals, typical), estimator.predict(blind, typical), strict=True
    ):
        np.testing.assert_array_equal(p, q)
    empty = estimator.predict(signals[:0], typical[:0])
    assert [len(p) for p in empty] == [0, 0]


def confidence_law(signals: Array, typical: Array) -> Array:
    odds = np.log(typical / (1 - typical))
    top, gap = signals[:, Signal.LOG_TOP], signals[:, Signal.LOG_TOP] - signals[:, Signal.LOG_Q]
    confidence = np.array([log_odds(each) for each in top])
    return sigmoid(1.2 + 0.9 * confidence - 1.2 * gap + 0.8 * odds)


def entropy_law(signals: Array, typical: Array) -> Array:
    return sigmoid(2.0 + 0.3 * signals[:, Signal.LOG_Q] - 1.5 * signals[:, Signal.ENTROPY])


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("name", "law"), [("confidence", confidence_law), ("entropy", entropy_law)]
)
def test_online_estimators_find_a_law_of_their_kind(
    name: str, law: Callable[[Array, Array], Array]
) -> None:
    """20,000 candidates, a few at a time, as rounds bring them; other seeds give the same."""
    estimator, prior = online_estimator(name), online_estimator(name)
    signals, typical = world(20_000)
    truth = law(signals, typical)
    accepted = np.random.default_rng(1).random(20_000) < truth
    for at in np.array_split(np.arange(20_000), 1000):
        estimator.learn(signals[at], typical[at], accepted[at])
    signals, typical = world(5000, seed=2)
    truth = law(signals, typical)
    accepted = np.random.default_rng(3).random(5000) < truth
    before, after = estimator.predict(signals, typical)
    assert np.abs(after - truth).mean() < 0.03
    # Not knowing the candidate costs something, but what is said is true on average.
    assert abs(before.mean() - truth.mean()) < 0.02
    guess_before, guess_after = prior.predict(signals, typical)
    least = log_loss(truth, accepted)
    assert log_loss(after, accepted) < least + 0.005 < log_loss(guess_after, accepted)
    assert log_loss(after, accepted) < log_loss(before, accepted)
    assert log_loss(before, accepted) < log_loss(guess_before, accepted)


def test_online_estimators_follow_a_law_that_changes() -> None:
    estimator = online_estimator("confidence")
    signals, typical = world(200)
    for _ in range(200):
        estimator.learn(signals, typical, np.ones(200, dtype=bool))
    assert estimator.predict(signals, typical)[1].mean() > 0.95
    for _ in range(200):
        estimator.learn(signals, typical, np.zeros(200, dtype=bool))
    assert estimator.predict(signals, typical)[1].mean() < 0.05


@pytest.mark.statistical
@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("log_q", [-1.0, -4.0, -8.0])
def test_first_candidates_do_not_throw_an_online_estimator_off(batch: int, log_q: float) -> None:
    """A draft whose confidence says nothing, against the guess that an estimator begins with.

    Whole Newton steps ran off to predictions of 0 and 1 here, for good: an error of 0.38.
    """
    rng = np.random.default_rng(0)
    estimator = online_estimator("confidence")

    def candidates(n: int) -> tuple[Array, Array, Flags]:
        signals = np.zeros((n, len(Signal)))
        signals[:, Signal.LOG_Q] = rng.normal(log_q, 1.5, n)
        signals[:, Signal.LOG_TOP] = rng.normal(log_q / 2, 0.5, n)
        return signals, np.full(n, 0.35), rng.random(n) < 0.32

    for _ in range(640 // batch):
        estimator.learn(*candidates(batch))
    signals, typical, accepted = candidates(5000)
    for p in estimator.predict(signals, typical):
        assert np.abs(p - 0.32).mean() < 0.08
        assert log_loss(p, accepted) < log_loss(np.full(5000, 0.32), accepted) + 0.03


def test_one_odd_batch_does_not_upset_an_online_estimator() -> None:
    """Extreme signals, all candidates alike: weights and predictions stay finite."""
    estimator = online_estimator("confidence")
    signals, typical = world(50)
    signals[:, Signal.LOG_Q] = -87.0
    for accepted in (True, False, True):
        estimator.learn(signals, typical, np.full(50, accepted))
    for p in estimator.predict(*world(50, seed=5)):
        assert np.isfinite(p).all() and ((p > 0) & (p < 1)).all()


def head_world(lie: float, n: int = 4000) -> tuple[Array, Array, Flags]:
    """Candidates accepted with the head's probability, moved by `lie` in log odds."""
    signals, typical = world(n, seed=4)
    truth = sigmoid(signals[:, Signal.HEAD_AFTER] - lie)
    return signals, typical, np.random.default_rng(5).random(n) < truth


@pytest.mark.statistical
def test_a_head_that_tells_the_truth_is_believed() -> None:
    """Its calibration error over 1,000 remembered candidates is about 0.03; 0.15 is never met."""
    estimator = HeadEstimator()
    signals, typical, accepted = head_world(lie=0.0)
    for at in np.array_split(np.arange(len(signals)), 200):
        estimator.learn(signals[at], typical[at], accepted[at])
        assert not estimator.fallen_back
    before, after = estimator.predict(signals, typical)
    np.testing.assert_allclose(before, sigmoid(signals[:, Signal.HEAD_BEFORE]))
    np.testing.assert_allclose(after, sigmoid(signals[:, Signal.HEAD_AFTER]))


@pytest.mark.parametrize("lie", [-2.5, 2.5])
def test_a_head_that_is_wrong_is_replaced_by_what_was_learnt_meanwhile(lie: float) -> None:
    estimator = HeadEstimator()
    signals, typical, accepted = head_world(lie)
    for at in np.array_split(np.arange(len(signals)), 200):
        seen = estimator.calibration.judged
        estimator.learn(signals[at], typical[at], accepted[at])
        if estimator.fallen_back:
            break
    # Not by a handful of candidates, and soon after there were enough.
    assert HeadEstimator.LEAST - 20 < seen < 2 * HeadEstimator.LEAST
    predicted = estimator.predict(signals, typical)[1]
    np.testing.assert_array_equal(predicted, estimator.fallback.predict(signals, typical)[1])
    assert abs(predicted.mean() - accepted.mean()) < 0.1


def test_a_head_that_goes_wrong_later_is_noticed() -> None:
    """Old truths are forgotten: a job's later shards may be of another kind."""
    estimator = HeadEstimator()
    for lie in (0.0, 0.0, 0.0, 3.0):
        assert not estimator.fallen_back
        signals, typical, accepted = head_world(lie)
        for at in np.array_split(np.arange(len(signals)), 200):
            estimator.learn(signals[at], typical[at], accepted[at])
    assert estimator.fallen_back


def test_the_online_estimator_learns_for_ever_from_greedy_candidates() -> None:
    """Their two probabilities are one; once the prior was forgotten, the system was singular."""
    rng = np.random.default_rng(0)
    estimator = online_estimator("confidence")
    typical = np.full(20, 0.5)
    signals = np.zeros((20, len(Signal)))
    for _ in range(15_000):
        log_q = -rng.exponential(1, 20)
        signals[:, Signal.LOG_Q] = signals[:, Signal.LOG_TOP] = log_q
        estimator.learn(signals, typical, rng.random(20) < np.exp(log_q))
    assert all(np.isfinite(p).all() for p in estimator.predict(signals, typical))
