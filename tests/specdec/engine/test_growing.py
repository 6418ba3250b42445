"""`goodput` with trees: they change when tokens come, and never which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from specdec.engine.engine import Engine
from specdec.policies import growing as growing_
from specdec.policies.base import RoundOutcome
from specdec.policies.costs import CostModel
from specdec.policies.estimators import online_estimator
from specdec.policies.goodput import Goodput
from specdec.policies.kinds import Kind, Kinds
from specdec.request import SamplingParams
from tests.specdec.engine.references import Reference
from tests.specdec.engine.test_rejection import excess_of
from tests.specdec.tiny_models import TinyPair
from tests.specdec.workloads import (
    GREEDY,
    SAMPLED,
    SOME,
    Prompt,
    linear,
    outputs,
    requests_of,
    staircase,
    stated,
)


@pytest.fixture(autouse=True)
def room_for_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees although places in the verification cost something."""
    monkeypatch.setattr(growing_, "MOST_OF_SECOND", 1.0)


class Always(Kinds):
    """Rounds of trees where these are possible, whatever they bring."""

    def choose(self, rows: int, possible: Sequence[Kind]) -> Kind:
        return possible[-1]


class Growing(Goodput):
    """`goodput` that grows trees where forwards take what its costs say.

    Attributes:
        branched: rounds in which a node that has a better sibling was submitted.
    """

    branched = 0

    def observe(self, outcome: RoundOutcome) -> None:
        for parents, kept in zip(outcome.parents, outcome.kept, strict=True):
            of = [parents[node] for node in kept]
            self.branched += len({*of}) < len(of)
        super().observe(stated(outcome, self.costs))


def growing(width: int = 3, step: int = 24) -> Growing:
    costs = CostModel(linear(0.02, 0.0), staircase(step, 0.3))
    policy = Growing(online_estimator("confidence"), None, costs, k_max=6, width=width)
    policy.kinds = Always()
    policy._judged, policy._accepted = 200.0, 140.0  # so that a few bad candidates do not end it
    return policy


@pytest.mark.parametrize(("slots", "mode"), [(1, "rejection"), (4, "coupled"), (16, "rejection")])
def test_greedy_equals_transformers_generate(
    pair: TinyPair, reference: Reference, slots: int, mode: Any
) -> None:
    policy = growing()
    engine = Engine(
        replace(pair, eos_token_ids=frozenset({reference.eos})),
        policy=policy,
        verification=mode,
        slots=slots,
        prefill_chunk=64,
        lookup=False,  # rounds with known candidates have no trees
    )
    assert outputs(engine.generate(requests_of(reference.prompts, GREEDY))) == reference.outputs
    assert policy.branched > 5


@pytest.mark.parametrize(("slots", "width"), [(1, 2), (16, 4)])
def test_coupled_sampling_equals_plain_target_sampling(
    pair: TinyPair, by_hand: list[Prompt], slots: int, width: int
) -> None:
    policy = growing(width)
    options: Any = {"verification": "coupled", "slots": slots, "prefill_chunk": 64}
    engine = Engine(pair, policy=policy, lookup=False, **options)
    assert outputs(engine.generate(requests_of(SOME, SAMPLED))) == by_hand
    assert policy.branched


@pytest.mark.statistical
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(top_p=0.85)], ids=str)
def test_outputs_have_the_targets_distribution(
    small_pair: TinyPair, sampling: SamplingParams
) -> None:
    """Chi-square of three tokens jointly, 125 cells, 4,000 requests; false alarm 1e-6."""
    policy = growing(step=2048)  # so that 256 rows have room to branch
    assert excess_of(small_pair, policy, sampling, "rejection", 4_000, True, lookup=False) < 1
    assert policy.branched > 100
