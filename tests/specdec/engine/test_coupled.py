"""Under `coupled`, output is a function of the seed and the target alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.policies.base import StopPolicy
from specdec.policies.registry import make_policy
from specdec.policies.simple import Fixed
from specdec.request import Request, SamplingParams
from tests.specdec.tiny_models import DEVICE, TinyPair, make_pair, noisy_copy
from tests.specdec.workloads import (
    GREEDY,
    POLICIES,
    SAMPLED,
    SOME,
    Prompt,
    make,
    outputs,
    requests_of,
    sampled_and_greedy,
)


@pytest.mark.parametrize("slots", [1, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_coupled_sampling_equals_plain_target_sampling(
    pair: TinyPair, by_hand: list[Prompt], policy: str, slots: int
) -> None:
    engine = Engine(
        pair, policy=make(policy), verification="coupled", slots=slots, prefill_chunk=64
    )
    some = SOME[:5] if slots == 1 else SOME
    assert outputs(engine.generate(requests_of(some, SAMPLED))) == by_hand[: len(some)]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.5])
def test_coupled_sampling_is_the_same_for_any_draft(
    target_model: PreTrainedModel, by_hand: list[Prompt], noise: float
) -> None:
    pair = make_pair(target_model, noisy_copy(target_model, noise, seed=17))
    engine = Engine(pair, policy=Fixed(4), verification="coupled", slots=5)
    assert outputs(engine.generate(requests_of(SOME, SAMPLED))) == by_hand


def test_another_seed_gives_other_tokens(pair: TinyPair) -> None:
    def run(seed: int) -> list[Prompt]:
        engine = Engine(pair, policy=Fixed(2), verification="coupled")
        return outputs(engine.generate(requests_of(SOME[:4], replace(SAMPLED, seed=seed))))

    assert run(1) == run(1)
    assert all(one != other for one, other in zip(run(1), run(1000), strict=True))


MIXED = [
    SamplingParams(temperature=0.0, max_new_tokens=12),
    SamplingParams(temperature=1.0, max_new_tokens=20, seed=1),
    SamplingParams(temperature=0.7, top_k=5, max_new_tokens=5, seed=2),
    SamplingParams(temperature=1.5, top_p=0.8, max_new_tokens=17, seed=3),
    SamplingParams(temperature=1.0, min_p=0.2, max_new_tokens=1, seed=4),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05, max_new_tokens=9, seed=5),
    SamplingParams(temperature=0.0, max_new_tokens=30, top_p=0.5),
    SamplingParams(temperature=2.0, max_new_tokens=11, seed=-(2**63)),
]


def test_requests_with_their_own_parameters_give_the_same_alone_and_together(
    pair: TinyPair,
) -> None:
    requests = [Request(f"m{i}", SOME[i], sampling) for i, sampling in enumerate(MIXED)]

    def engine() -> Engine:
        return Engine(pair, policy=make_policy("heuristic"), verification="coupled", slots=4)

    together = outputs(engine().generate(requests))
    assert together == [outputs(engine().generate([request]))[0] for request in requests]
    assert [len(output) for output in together] == [s.max_new_tokens for s in MIXED]


@pytest.fixture(scope="module", params=["float32", "int8", "int8wo"])
def invariant_pair(
    request: pytest.FixtureRequest, target_model: PreTrainedModel, draft_model: PreTrainedModel
) -> TinyPair:
    return make_pair(target_model, draft_model, precision=request.param, invariant=True)


def test_batch_invariant_pairs_give_the_same_tokens_whatever_runs(
    invariant_pair: TinyPair,
) -> None:
    requests = sampled_and_greedy(SOME)

    def run(policy: StopPolicy, slots: int, pair: TinyPair = invariant_pair) -> list[Prompt]:
        engine = Engine(pair, policy=policy, verification="coupled", slots=slots, prefill_chunk=64)
        return outputs(engine.generate(requests))

    alone = run(StopPolicy(), 1, replace(invariant_pair, draft=None))
    for k, slots in ((0, 16), (1, 16), (4, 1), (4, 16), (8, 16)):
        assert run(Fixed(k), slots) == alone, (k, slots)
    assert run(make("scripted"), 5) == alone
    # An interrupted job: some requests run again, in another order and company.
    again = Engine(invariant_pair, policy=Fixed(3), verification="coupled", slots=3)
    again.prefill_chunk = 64
    assert outputs(again.generate(requests[:4:-1])) == alone[:4:-1]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's matrix products depend on the batch")
@pytest.mark.parametrize("k", [1, 8, 20, 23, 24, 40])
def test_a_batch_invariant_target_gives_the_same_logits_however_many_it_verifies(
    target_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    """With the target as its own draft every scored position is committed: the same ones in all."""
    pair = make_pair(target_model, target_model, precision="float32", invariant=True)
    honest = pair.target.logits
    seen: list[Tensor] = []

    def recorded(hidden: Tensor) -> Tensor:
        seen.append(honest(hidden))
        return seen[-1]

    monkeypatch.setattr(pair.target, "logits", recorded)

    def run(k: int) -> Tensor:
        seen.clear()
        engine = Engine(pair, policy=Fixed(k), slots=1)
        request = Request("a", SOME[1], replace(GREEDY, max_new_tokens=60))
        (done,) = engine.generate([request])
        logits = torch.cat(seen)
        assert len(done.output_ids) == len(logits) == 60
        return logits

    assert torch.equal(run(k), run(0))
