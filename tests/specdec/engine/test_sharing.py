"""Rows that begin alike share their prefill, and nothing that they generate changes by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.engine import INVARIANT_CHUNK, Engine
from specdec.model.pages import PAGE
from specdec.policies.base import StopPolicy
from specdec.policies.registry import make_policy
from specdec.policies.simple import Fixed
from specdec.request import Request
from tests.specdec.tiny_models import TinyPair, make_pair
from tests.specdec.workloads import (
    GREEDY,
    SAMPLED,
    Prompt,
    make,
    outputs,
    prompts,
    requests_of,
    sampled_and_greedy,
)

NEVER = 10**9
PROMPT, OTHER, SHOTS = prompts((200, 90, 150), seed=8)
SAMPLES = [PROMPT] * 8
FEW_SHOT = [(*SHOTS, *question) for question in prompts((5, 40, 1, 200, 33, 12), seed=9)]
MIXED = [*SAMPLES, OTHER, *FEW_SHOT, PROMPT[:60], OTHER, PROMPT]


def generated(
    pair: TinyPair, requests: Sequence[Request], policy: StopPolicy, slots: int = 8, **options: int
) -> tuple[list[Prompt], Engine]:
    mode = "coupled"
    engine = Engine(
        pair, policy=policy, verification=mode, slots=slots, prefill_chunk=64, **options
    )
    return outputs(engine.generate(requests)), engine


@pytest.mark.parametrize(
    ("policy", "slots"),
    [("none", 1), ("fixed 4", 5), ("heuristic", 16), ("scripted", 3), ("goodput stated", 16)],
)
def test_sharing_changes_no_token(pair: TinyPair, policy: str, slots: int) -> None:
    requests = sampled_and_greedy(MIXED)
    apart, plain = generated(pair, requests, make(policy), slots, least_shared=NEVER)
    together, engine = generated(pair, requests, make(policy), slots)
    assert together == apart
    assert plain.stats.shared_tokens == 0
    saved = plain.stats.target_tokens - engine.stats.target_tokens
    # Of rows that left, full pages are found.
    assert engine.stats.shared_tokens >= 7 * (198 // PAGE * PAGE) + 5 * (150 // PAGE * PAGE)
    if policy == "none":
        assert saved == engine.stats.shared_tokens
    if policy == "fixed 4":
        assert plain.stats.draft_tokens - engine.stats.draft_tokens > 8 * 198


def test_a_prompts_samples_feed_it_once_to_target_and_draft(pair: TinyPair) -> None:
    sampling = replace(SAMPLED, max_new_tokens=12)
    _, engine = generated(pair, requests_of(SAMPLES, sampling), Fixed(2))
    # All but the last two tokens once, these for each; then rounds of three tokens.
    assert engine.stats.shared_tokens == 7 * 198
    assert engine.stats.target_tokens <= 198 + 8 * 2 + 8 * 12 * 3
    assert engine.stats.draft_tokens <= 198 + 8 * (2 + 1) + 8 * 12 * 3


def test_a_live_siblings_unfinished_prefill_is_finished_for_both(pair: TinyPair) -> None:
    first, second = requests_of([PROMPT, PROMPT], GREEDY)
    engine = Engine(pair, policy=make_policy("none"), slots=4, prefill_chunk=32)
    engine.submit(first)
    engine.step()
    assert engine.target_cache.lengths[0] == 32
    engine.submit(second)
    engine.step()
    assert engine.stats.target_tokens == 198 + 2 + 2
    assert engine.stats.shared_tokens == 198
    done = []
    while engine.has_work:
        done += engine.step()
    assert done[0].output_ids == done[1].output_ids
    alone, _ = generated(pair, [first], make_policy("none"), least_shared=NEVER)
    assert outputs(done)[:1] == alone


@pytest.mark.parametrize("policy", [Fixed(0), Fixed(3)], ids=["none", "fixed"])
def test_a_conversation_goes_on_from_what_the_last_turn_left(
    pair: TinyPair, policy: StopPolicy
) -> None:
    """The next prompt begins with the last one and its output, whose full pages are there still."""
    engine = Engine(pair, policy=policy, slots=2)
    (first,) = outputs(engine.generate(requests_of([PROMPT], GREEDY)))
    following = (*PROMPT, *first, *OTHER)
    again = outputs(engine.generate(requests_of([following], GREEDY)))
    assert engine.stats.shared_tokens == (len(PROMPT) + len(first) - 2) // PAGE * PAGE
    apart, _ = generated(pair, requests_of([following], GREEDY), Fixed(0), least_shared=NEVER)
    assert again == apart


def test_under_rejection_a_sample_draws_what_it_draws_without_siblings(pair: TinyPair) -> None:
    """Its first round feeds the end of its prompt and drafts nothing, shared or not."""
    requests = requests_of(SAMPLES, SAMPLED)

    def run(requests: Sequence[Request], least: int) -> list[Prompt]:
        engine = Engine(pair, policy=Fixed(3), slots=8, least_shared=least)
        return outputs(engine.generate(requests))

    together = run(requests, 32)
    assert together == run(requests, NEVER)
    assert together == [run([request], 32)[0] for request in requests]
    assert len(set(together)) > len(together) // 2


@pytest.fixture(scope="module", params=["float32", "int8", "int8wo"])
def invariant_pair(
    request: pytest.FixtureRequest, target_model: PreTrainedModel, draft_model: PreTrainedModel
) -> TinyPair:
    return make_pair(target_model, draft_model, precision=request.param, invariant=True)


@pytest.mark.parametrize("chunk", [64, 512])
def test_with_batch_invariant_models_shared_prompts_give_the_same_logits(
    invariant_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """To the bit: a prompt after a sibling, after a row with the same beginning, and alone."""
    honest = invariant_pair.target.logits
    seen: list[Tensor] = []

    def recorded(hidden: Tensor) -> Tensor:
        seen.append(honest(hidden))
        return seen[-1]

    monkeypatch.setattr(invariant_pair.target, "logits", recorded)
    pair = replace(invariant_pair, draft=None)
    (long,) = prompts((300,), seed=4)
    request = requests_of([long], GREEDY)
    # One that ends inside the shared part, one that begins alike, one that goes on after it.
    before = [[long], [(*long[:290], *OTHER)], [(*long, *OTHER)], [long[:200]]]

    def run(earlier: Sequence[Prompt], least: int = 32) -> tuple[Tensor, int]:
        engine = Engine(pair, policy=StopPolicy(), slots=1, prefill_chunk=chunk, least_shared=least)
        engine.generate(requests_of(earlier, GREEDY))
        shared = engine.stats.shared_tokens
        seen.clear()
        engine.generate(request)
        return torch.cat(seen)[-GREEDY.max_new_tokens :], engine.stats.shared_tokens - shared

    alone, shared = run([], NEVER)
    assert shared == 0
    piece = min(chunk, INVARIANT_CHUNK)
    for earlier, most in zip(before, (298, 290, 298, 198), strict=True):
        logits, shared = run(earlier)
        assert shared == most // piece * piece > 0
        assert torch.equal(logits, alone)


def test_batch_invariant_pairs_give_the_same_tokens_however_they_share(
    invariant_pair: TinyPair,
) -> None:
    requests = sampled_and_greedy(MIXED)
    apart, _ = generated(invariant_pair, requests, Fixed(0), 1, least_shared=NEVER)
    for k, slots in ((0, 16), (4, 3), (4, 16)):
        together, engine = generated(invariant_pair, requests, Fixed(k), slots)
        assert together == apart, (k, slots)
        assert engine.stats.shared_tokens > 8 * 192
