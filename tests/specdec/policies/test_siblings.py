"""What a node's further children are worth, given that its better ones were rejected."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.policies.base import Signal
from specdec.policies.siblings import Sibling, given_parent, sibling_estimator, sibling_evidence

RANKS = np.array([0, 1, 2, 0, 0, 1])
"""Children of three nodes."""


def test_a_child_counts_where_the_better_ones_fell() -> None:
    chances = np.array([0.5, 0.4, 0.5, 0.8, 0.1, 0.05])
    found = given_parent(chances, RANKS)
    assert found == pytest.approx([0.5, 0.5 * 0.4, 0.5 * 0.6 * 0.5, 0.8, 0.1, 0.9 * 0.05])


def test_no_child_is_taken_for_likelier_than_a_better_one() -> None:
    assert given_parent(np.array([0.1, 0.9, 0.9]), np.arange(3)) == pytest.approx([0.1, 0.1, 0.081])


def test_its_share_is_of_what_the_better_ones_left() -> None:
    q = np.array([0.5, 0.3, 0.1, 0.9, 0.25, 0.75])
    signals = np.zeros((6, len(Signal)))
    signals[:, Signal.LOG_Q] = np.log(q)
    share = np.exp(sibling_evidence(signals, RANKS)[:, Sibling.LOG_SHARE])
    assert share == pytest.approx([0.5, 0.6, 0.5, 0.9, 0.25, 1.0])


def test_before_it_is_drawn_only_better_siblings_tell() -> None:
    """The estimate that rejection sampling may keep by knows no LOG_Q of it or of worse ones."""
    chance = np.random.default_rng(1)
    signals, ranks = np.zeros((40, len(Signal))), np.tile(np.arange(4), 10)
    signals[:, [Signal.LOG_TOP, Signal.ENTROPY]] = chance.normal(-1, 1, (10, 2)).repeat(4, 0)
    typical, estimator = np.full(40, 0.7), sibling_estimator()
    signals[:, Signal.LOG_Q] = -1 - chance.exponential(2, 40)
    estimator.learn(sibling_evidence(signals, ranks), typical, chance.random(40) < 0.4)
    first = estimator.predict(sibling_evidence(signals, ranks), typical)
    for rank in range(4):
        others = signals.copy()
        others[ranks >= rank, Signal.LOG_Q] -= 0.5
        second = estimator.predict(sibling_evidence(others, ranks), typical)
        same = ranks <= rank
        assert np.array_equal(first[0][same], second[0][same])
        assert not np.allclose(first[1][ranks == rank], second[1][ranks == rank])


def test_it_learns_what_second_children_are_worth() -> None:
    chance = np.random.default_rng(2)
    estimator, typical = sibling_estimator(), np.full(64, 0.8)
    ranks = np.tile(np.arange(2), 64)
    for _ in range(60):
        signals = np.zeros((128, len(Signal)))
        first = chance.uniform(0.3, 0.6, 64)
        share = chance.uniform(0.1, 0.95, 64)
        signals[0::2, Signal.LOG_Q], signals[1::2, Signal.LOG_Q] = np.log(
            [first, (1 - first) * share]
        )
        signals[:, Signal.LOG_TOP] = np.log(first).repeat(2)
        seconds = sibling_evidence(signals, ranks)[1::2]
        estimator.learn(seconds, typical, chance.random(64) < share)
    _, after = estimator.predict(seconds, typical)
    assert np.abs(after - share).mean() < 0.05
