"""Models whose state runs on, as target and as draft: output is that of plain decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.measure.clock import PhaseClock
from specdec.policies.simple import Fixed
from specdec.request import SamplingParams
from tests.specdec.engine.references import generate, sampled_by_hand
from tests.specdec.engine.test_rejection import TINY_HIDDEN, TINY_VOCAB, excess_of
from tests.specdec.recurrent_models import DELTA, recurrent_model
from tests.specdec.tiny_models import TinyPair, make_pair, noisy_copy, tiny_model
from tests.specdec.workloads import (
    GREEDY,
    SAMPLED,
    SOME,
    Prompt,
    make,
    outputs,
    prompts,
    requests_of,
)

TOGETHER = ["none", *(f"fixed {k}" for k in range(1, 9)), "goodput stated", "scripted"]
ALONE = ["none", "fixed 2", "fixed 7", "goodput stated"]


@pytest.fixture(scope="module")
def target_model() -> PreTrainedModel:
    return recurrent_model("qwen3_next", seed=3)


@pytest.fixture(scope="module")
def pair(target_model: PreTrainedModel) -> TinyPair:
    return make_pair(target_model, noisy_copy(target_model, 0.05))


@pytest.fixture(scope="module")
def greedy(target_model: PreTrainedModel) -> list[Prompt]:
    return [generate(target_model, prompt, 24) for prompt in SOME]


@pytest.fixture(scope="module")
def by_hand(target_model: PreTrainedModel) -> list[Prompt]:
    return [sampled_by_hand(target_model, request) for request in requests_of(SOME, SAMPLED)]


def policy_of(name: str) -> object:
    kind, _, k = name.partition(" ")
    return Fixed(int(k)) if kind == "fixed" else make(name)


@pytest.mark.parametrize(
    ("policy", "slots"), [*((name, 16) for name in TOGETHER), *((name, 1) for name in ALONE)]
)
def test_greedy_and_coupled_output_is_that_of_plain_decoding(
    pair: TinyPair, greedy: list[Prompt], by_hand: list[Prompt], policy: str, slots: int
) -> None:
    """Ragged prompts, prefill in chunks, rollbacks of every length."""
    some = slice(0, 3) if slots == 1 else slice(None)
    for sampling, expected in ((GREEDY, greedy), (SAMPLED, by_hand)):
        engine = Engine(
            pair,
            policy=policy_of(policy),  # type: ignore[arg-type]
            verification="coupled",
            slots=slots,
            prefill_chunk=64,
        )
        done = outputs(engine.generate(requests_of(SOME, sampling)[some]))
        assert done == expected[some]
        if policy.startswith("fixed"):
            assert 0.2 < (engine.stats.counts.acceptance_rate or 0) < 0.99


@pytest.mark.parametrize(
    "family", ["qwen3_5_text", "lfm2", "granitemoehybrid", "falcon_h1", "nemotron_h", "jamba"]
)
def test_greedy_equals_generate_in_each_kind_of_family(family: str) -> None:
    """Refills of slots."""
    model = recurrent_model(family, seed=3)
    engine = Engine(
        make_pair(model, noisy_copy(model, 0.05)), policy=Fixed(4), slots=4, prefill_chunk=32
    )
    many = prompts((1, 40, 9, 70, 25))
    done = outputs(engine.generate(requests_of(many, GREEDY)))
    assert done == [generate(model, prompt, 24) for prompt in many]


@pytest.mark.parametrize("side", ["target", "draft"])
def test_one_side_may_have_states_and_the_other_none(
    target_model: PreTrainedModel, greedy: list[Prompt], side: str
) -> None:
    plain = tiny_model("llama", seed=5)
    if side == "target":
        pair, expected = make_pair(target_model, plain), greedy
    else:
        pair = make_pair(plain, target_model)
        expected = [generate(plain, prompt, 24) for prompt in SOME]
    engine = Engine(pair, policy=Fixed(3), slots=5, prefill_chunk=64)
    assert outputs(engine.generate(requests_of(SOME, GREEDY))) == expected


class RunningAhead(PhaseClock):
    """That of a device that works beside the host: draft steps are launched before decisions."""

    @property
    def asynchronous(self) -> bool:
        return True


@pytest.mark.parametrize("policy", ["confidence", "goodput stated", "scripted"])
def test_draft_steps_that_ran_ahead_in_vain_are_taken_back(
    pair: TinyPair, by_hand: list[Prompt], policy: str
) -> None:
    engine = Engine(
        pair,
        policy=make(policy),
        verification="coupled",
        slots=5,
        clock=RunningAhead(pair.target.device),
    )
    assert outputs(engine.generate(requests_of(SOME, SAMPLED))) == by_hand


def test_more_candidates_than_can_be_taken_back_are_never_drafted(
    target_model: PreTrainedModel, greedy: list[Prompt]
) -> None:
    engine = Engine(make_pair(target_model, target_model), policy=Fixed(40), slots=4)
    sampling = replace(GREEDY, max_new_tokens=60)
    (done,) = engine.generate(requests_of(SOME[1:2], sampling))
    assert done.output_ids == generate(engine.pair.plain, SOME[1], 60)  # type: ignore[attr-defined]
    # All are accepted: 1 token with the prompt, 24 in each of two rounds, the rest.
    assert done.counts.rounds == 4


def test_samples_of_a_prompt_share_its_prefill_and_nothing_changes(pair: TinyPair) -> None:
    (prompt,) = prompts((90,), seed=8)
    requests = requests_of([prompt] * 6, SAMPLED)

    def run(least: int) -> tuple[list[Prompt], Engine]:
        engine = Engine(pair, policy=Fixed(3), verification="coupled", slots=8, least_shared=least)
        return outputs(engine.generate(requests)), engine

    together, engine = run(32)
    apart, plain = run(10**9)
    assert together == apart and len(set(together)) > 1
    assert engine.stats.shared_tokens == 5 * 88 and plain.stats.shared_tokens == 0
    assert plain.stats.target_tokens - engine.stats.target_tokens == 5 * 88


def test_rows_that_begin_as_one_that_has_gone_on_are_computed_by_themselves(
    pair: TinyPair, target_model: PreTrainedModel
) -> None:
    (prompt,) = prompts((90,), seed=8)
    engine = Engine(pair, policy=Fixed(2), slots=2)
    requests = requests_of([prompt, (*prompt, 5, 6, 7), (*prompt[:70], 1, 2), prompt], GREEDY)
    done = outputs(engine.generate(requests))
    assert done == [generate(target_model, request.prompt_ids, 24) for request in requests]


@pytest.mark.parametrize("k", [0, 3])
def test_rows_that_are_sent_back_go_on_as_if_they_had_stayed(pair: TinyPair, k: int) -> None:
    sampling = replace(SAMPLED, max_new_tokens=50)

    def run(pages: int) -> tuple[list[Prompt], Engine]:
        engine = Engine(pair, policy=Fixed(k), verification="coupled", slots=6, prefill_chunk=32)
        engine.scheduler.pages = pages
        for _ in range(40):  # outputs seem to be short, so that too many rows are admitted
            engine.scheduler._lengths.add(4)
        many = prompts((40, 3, 25, 60, 12, 90), seed=3)
        return outputs(engine.generate(requests_of(many, sampling))), engine

    plenty, engine = run(1000)
    assert engine.stats.preempted == 0
    short, engine = run(9)
    assert engine.stats.preempted > 0
    assert short == plenty


def test_prompt_logprobs_change_no_output(pair: TinyPair) -> None:
    engine = Engine(pair, policy=Fixed(2), slots=4, prefill_chunk=32)
    plain = outputs(engine.generate(requests_of(SOME[:4], GREEDY)))
    asked = replace(GREEDY, prompt_logprobs=1)
    done = engine.generate(requests_of(SOME[:4], asked))
    assert outputs(done) == plain
    assert [len(each.prompt_logprobs or ()) for each in done] == [len(p) for p in SOME[:4]]


def test_large_states_mean_fewer_rows_in_flight(
    pair: TinyPair, greedy: list[Prompt], caplog: pytest.LogCaptureFixture
) -> None:
    assert pair.draft is not None
    each = sum(model.new_cache(0, 0).bytes_per_slot for model in (pair.target, pair.draft))
    engine = Engine(pair, policy=Fixed(2), slots=16, kv_memory_bytes=6 * each + 3)
    assert engine.scheduler.slots == 3
    assert "3 rows in flight, not 16" in caplog.text
    assert outputs(engine.generate(requests_of(SOME, GREEDY))) == greedy


@pytest.mark.statistical
def test_the_outputs_have_the_targets_distribution_under_rejection() -> None:
    """Chi-square of three tokens jointly, 125 cells, 4,000 requests; false alarm 1e-6."""
    shape = {"vocab": TINY_VOCAB, "hidden": TINY_HIDDEN, "heads": 2, "kv_heads": 1}
    model = tiny_model("qwen3_5_text", **(DELTA | shape), peak=60.0, seed=4)
    pair = make_pair(model, noisy_copy(model, 0.4))
    made = make("scripted", TINY_HIDDEN)
    assert excess_of(pair, made, SamplingParams(), "rejection", 4_000, True) < 1


@torch.inference_mode()
def test_a_model_without_positions_runs_as_long_as_it_is_asked_to() -> None:
    model = recurrent_model("mamba2")
    del model.config.max_position_embeddings
    pair = make_pair(tiny_model("llama"), None)
    packed = type(pair.target)(model)
    assert packed.context_length > 10**6
    assert packed.layout == ()
