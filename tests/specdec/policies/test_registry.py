from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from specdec.engine.engine import Engine
from specdec.policies.base import HEAD_SIGNALS, Signal
from specdec.policies.estimating import Confidence, Entropy, HeadPolicy
from specdec.policies.estimators import HeadEstimator, OnlineEstimator
from specdec.policies.goodput import Goodput
from specdec.policies.registry import POLICIES, make_policy, takers
from specdec.policies.simple import Fixed, Heuristic, NoDrafting
from tests.specdec.policies.timid import Timid
from tests.specdec.tiny_models import TinyPair
from tests.specdec.workloads import GREEDY, SOME, outputs, random_head, requests_of, trimming_costs
from tests.specdec.workloads import POLICIES as RUN


def test_every_policy_can_be_made_by_name() -> None:
    made = {
        name: make_policy(name, k=3, k_min=2, k_max=8, threshold=0.7, estimator="entropy")
        for name in POLICIES
    }
    assert type(made["none"]) is NoDrafting
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
    defaults = {name: each.default for name, each in takers("threshold").items()}
    assert defaults.items() >= {"confidence": 0.4, "entropy": 0.4, "head": 0.7}.items()
    assert make_policy("confidence") == Confidence(defaults["confidence"])
    assert make_policy("entropy") == Entropy(defaults["entropy"])
    head = make_policy("head")
    assert isinstance(head, HeadPolicy) and head.threshold == defaults["head"]
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


def test_an_unknown_setting_is_an_error_that_names_those_of_the_policy() -> None:
    with pytest.raises(ValueError, match=r"'patience'.*heuristic takes k, k_min, k_max$"):
        make_policy("heuristic", patience=3)
    with pytest.raises(ValueError, match=r"goodput takes k_max, width, estimator$"):
        make_policy("goodput", K=3)
    with pytest.raises(ValueError, match=r"none takes none$"):
        make_policy("none", kmax=3)


@pytest.mark.parametrize(
    ("name", "key", "value", "bounds"),
    [
        ("fixed", "k", -1, "0 to 64"),
        ("goodput", "k_max", 0, "1 to 64"),
        ("head", "threshold", 1.5, "0 to 1"),
        ("entropy", "threshold", float("nan"), "0 to 1"),
    ],
)
def test_a_setting_out_of_its_bounds_is_an_error_that_names_them(
    name: str, key: str, value: float, bounds: str
) -> None:
    with pytest.raises(ValueError, match=f"{key} of the policy {name} must be from {bounds}"):
        make_policy(name, **{key: value})


def test_every_policy_says_what_it_is_and_what_it_takes() -> None:
    for name, policy in POLICIES.items():
        assert policy.name == name and policy.summary
        for each in policy.settings().values():
            assert each.least <= each.default <= each.most and each.meaning


# --------------------------------------------------------------------- a policy of one's own


def test_a_policy_of_ones_own_needs_its_class_and_a_line(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "timid", Timid)
    assert make_policy("timid") == Timid(0.9, 6)
    assert make_policy("timid", k=2, k_max=3, threshold=None) == Timid(0.9, 3)
    assert takers("threshold")["timid"].default == 0.9
    requests = requests_of(SOME, GREEDY)
    plain = Engine(pair, policy=make_policy("none"), slots=4).generate(requests)
    engine = Engine(pair, policy=make_policy("timid", k_max=4), slots=4)
    assert outputs(engine.generate(requests)) == outputs(plain)
    assert engine.stats.counts.drafted > 0


def test_a_job_file_knows_a_policy_of_ones_own_with_its_default_and_help() -> None:
    """In a process of its own: a job's fields are made when they are first imported."""
    code = """
from specdec.policies.registry import POLICIES, make_policy
from tests.specdec.policies.timid import Timid
POLICIES["timid"] = Timid
from pipeline.config.job import SpeculationConfig
job = SpeculationConfig(policy="timid", threshold=0.5, k_max=9)
assert make_policy(job.policy, **job.settings) == Timid(0.5, 9)
plain = SpeculationConfig(policy="timid")
assert make_policy(plain.policy, **plain.settings) == Timid(0.9, 6)
assert SpeculationConfig().k_max == SpeculationConfig(policy="heuristic").k_max == 20
for field, words in (("policy", Timid.summary), ("threshold", "the ratio is lower: `timid` (0.9)")):
    assert words in SpeculationConfig.model_fields[field].description, field
assert "timid" in SpeculationConfig.model_json_schema()["properties"]["policy"]["enum"]
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
