from __future__ import annotations

import pytest

from specdec.policies import registry
from specdec.policies.base import HEAD_SIGNALS, Signal, StopPolicy
from specdec.policies.estimating import Confidence, Entropy, HeadPolicy
from specdec.policies.estimators import HeadEstimator, OnlineEstimator
from specdec.policies.goodput import Goodput
from specdec.policies.registry import POLICIES, make_policy
from specdec.policies.simple import Fixed, Heuristic
from tests.specdec.workloads import POLICIES as RUN
from tests.specdec.workloads import random_head, trimming_costs


def test_every_policy_can_be_made_by_name() -> None:
    made = {
        name: make_policy(name, k=3, k_min=2, k_max=8, threshold=0.7, estimator="entropy")
        for name in POLICIES
    }
    assert type(made["none"]) is StopPolicy
    assert made["fixed"] == Fixed(3)
    assert made["heuristic"] == Heuristic(3, 2, 8)
    assert made["confidence"] == Confidence(0.7, 8)
    assert made["entropy"] == Entropy(0.7, 8)
    head, goodput = made["head"], made["goodput"]
    assert isinstance(head, HeadPolicy) and isinstance(goodput, Goodput)
    assert (head.threshold, head.k_min, head.k_max, goodput.k_max) == (0.7, 2, 8, 8)
    assert head.wanted == goodput.wanted == {Signal.LOG_Q, Signal.ENTROPY}


def test_the_tests_run_every_policy_that_there_is() -> None:
    assert {name.split()[0] for name in RUN} == {*POLICIES, "scripted"}


def test_each_policy_with_a_threshold_has_its_own_default() -> None:
    assert make_policy("confidence") == Confidence(registry.THRESHOLDS["confidence"])
    assert make_policy("entropy") == Entropy(registry.THRESHOLDS["entropy"])
    head = make_policy("head")
    assert isinstance(head, HeadPolicy) and head.threshold == registry.THRESHOLDS["head"]
    assert make_policy("confidence", threshold=0.0) == Confidence(0.0)


@pytest.mark.parametrize("name", ["head", "goodput"])
def test_a_head_is_the_estimator_if_there_is_one(name: str) -> None:
    head = random_head(8)
    with_head, without = make_policy(name, head=head), make_policy(name)
    assert isinstance(with_head, HeadPolicy | Goodput) and isinstance(without, HeadPolicy | Goodput)
    assert isinstance(with_head.estimator, HeadEstimator) and with_head.head is head
    assert with_head.wanted >= HEAD_SIGNALS
    assert isinstance(without.estimator, OnlineEstimator)
    assert not without.wanted & HEAD_SIGNALS
    online = make_policy(name, head=head, estimator="entropy")
    assert isinstance(online, HeadPolicy | Goodput)
    assert isinstance(online.estimator, OnlineEstimator)


def test_goodput_takes_costs_that_are_known() -> None:
    costs = trimming_costs()
    made = make_policy("goodput", costs=costs)
    assert isinstance(made, Goodput) and made.costs is costs


def test_an_unknown_policy_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"greedily.*{', '.join(POLICIES)}"):
        make_policy("greedily")


@pytest.mark.parametrize("name", ["head", "goodput"])
def test_an_unknown_estimator_is_an_error_that_names_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"astrology.*confidence, entropy, head"):
        make_policy(name, estimator="astrology")


@pytest.mark.parametrize("name", ["head", "goodput"])
def test_the_estimator_head_needs_a_head(name: str) -> None:
    with pytest.raises(ValueError, match="trained head"):
        make_policy(name, estimator="head")
