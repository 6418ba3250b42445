"""With keys and values of eight bits the output is that of the target that has them, alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.kernels.stored import KvDtype
from specdec.policies.base import StopPolicy
from specdec.policies.simple import Fixed
from specdec.request import SamplingParams
from tests.specdec.engine.test_memory import bytes_for
from tests.specdec.engine.test_preemption import EVERY_LAW, LONG, run
from tests.specdec.engine.test_trees import Wild
from tests.specdec.tiny_models import TinyPair, make_pair
from tests.specdec.workloads import GREEDY, SAMPLED, SOME, outputs, requests_of


def pair_of(target: PreTrainedModel, draft: PreTrainedModel, kv_dtype: KvDtype) -> TinyPair:
    """Batch-invariant, so that equality is to the bit and no near-tie decides."""
    return make_pair(target, draft, precision="float32", invariant=True, kv_dtype=kv_dtype)


@pytest.fixture(scope="module")
def eight(target_model: PreTrainedModel, draft_model: PreTrainedModel) -> TinyPair:
    return pair_of(target_model, draft_model, "int8")


@pytest.mark.parametrize(("kv_dtype", "sampling"), [("int8", SAMPLED), ("fp8", GREEDY)])
def test_every_policy_and_batch_gives_the_bits_of_the_target_alone(
    pair: TinyPair,
    target_model: PreTrainedModel,
    draft_model: PreTrainedModel,
    kv_dtype: KvDtype,
    sampling: SamplingParams,
) -> None:
    eight = pair_of(target_model, draft_model, kv_dtype)
    requests = requests_of(SOME, replace(sampling, logprobs=2))

    def run(policy: StopPolicy, slots: int, pair: TinyPair = eight) -> list[Any]:
        engine = Engine(pair, policy=policy, verification="coupled", slots=slots, prefill_chunk=64)
        return [(done.output_ids, done.logprobs) for done in engine.generate(requests)]

    alone = run(StopPolicy(), 1, replace(eight, draft=None))
    for policy, slots in ((Fixed(4), 16), (Fixed(3), 1), (Fixed(4, 3), 5), (Wild(), 16)):
        assert run(policy, slots) == alone, policy
    other = run(StopPolicy(), 1, replace(pair, draft=None))
    assert [probabilities for _, probabilities in other] != [each for _, each in alone]


@EVERY_LAW
def test_rows_that_are_sent_back_draw_the_same_tokens(
    eight: TinyPair, sampling: Any, mode: Any
) -> None:
    sampling = replace(sampling, max_new_tokens=LONG)
    plenty, engine = run(eight, sampling, None, Fixed(3, 2), mode)
    assert engine.stats.preempted == 0
    short, engine = run(eight, sampling, 9, Fixed(3, 2), mode)
    assert short == plenty and engine.stats.preempted > 0


def test_memory_holds_more_rows(pair: TinyPair, eight: TinyPair) -> None:
    """Heads of 16 numbers: 20 bytes in place of 64."""
    memory = bytes_for(pair, 1024)
    plain, more = (
        Engine(each, policy=Fixed(2), slots=64, kv_memory_bytes=memory) for each in (pair, eight)
    )
    requests = requests_of(SOME, replace(GREEDY, max_new_tokens=2))
    assert len(outputs(more.generate(requests))) == len(SOME)
    outputs(plain.generate(requests))
    assert more.shared.pages == pytest.approx(3.2 * plain.shared.pages, rel=0.1)
