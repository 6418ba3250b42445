"""Rows wait for slots and memory, and none is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.model.cache import KEY_BLOCK
from specdec.model.eagle import EagleDecoder
from specdec.model.pages import PAGE
from specdec.policies.simple import Fixed
from specdec.request import Request
from tests.specdec.engine.references import Reference
from tests.specdec.tiny_models import TinyPair, make_pair
from tests.specdec.workloads import (
    GREEDY,
    SAMPLED,
    SOME,
    Prompt,
    outputs,
    prompts,
    requests_of,
)


def bytes_for(pair: TinyPair, positions: int) -> int:
    """Memory for so many positions and the page that no row gets."""
    caches = [model.new_cache(0, 0) for model in (pair.target, pair.draft) if model is not None]
    if isinstance(pair.draft, EagleDecoder):
        caches[0].keep_features(pair.draft.features)
    return (positions + PAGE) * sum(cache.bytes_per_position for cache in caches)


def held(engine: Engine) -> int:
    """Bytes of keys and values that an engine holds now."""
    caches = {id(cache): cache for cache in (engine.target_cache, engine.drafter.cache)}
    return sum(t.nbytes for cache in caches.values() for t in (*cache.keys, *cache.values))


@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_rows_wait_for_memory_and_all_complete(
    pair: TinyPair, reference: Reference, blocks: int
) -> None:
    """Prompts of 1 to 200 tokens: few long rows are in flight together, and many short ones."""
    memory = bytes_for(pair, blocks * KEY_BLOCK)
    eos = replace(pair, eos_token_ids=frozenset({reference.eos}))
    engine = Engine(eos, policy=Fixed(3), slots=16, kv_memory_bytes=memory, prefill_chunk=64)
    for request in requests_of(reference.prompts, GREEDY):
        engine.submit(request)
    done, most = {}, 0
    while engine.has_work:
        done.update({each.id: each.output_ids for each in engine.step()})
        most = max(most, engine.live)
        assert held(engine) <= memory
    assert most > blocks
    assert [done[f"r{i}"] for i in range(len(done))] == reference.outputs


def test_a_request_too_large_for_the_memory_is_an_error(pair: TinyPair) -> None:
    memory = bytes_for(pair, 2 * KEY_BLOCK)
    engine = Engine(pair, policy=Fixed(3), kv_memory_bytes=memory)
    fits, large = prompts((200, 300))
    good, bad = engine.generate([Request("a", fits, GREEDY), Request("b", large, GREEDY)])
    assert len(good.output_ids) == 24
    assert bad.finish_reason == "error"
    assert "324 cache positions" in (bad.error or "") and "256" in (bad.error or "")


def test_a_request_that_just_fits_the_memory_is_served(pair: TinyPair) -> None:
    engine = Engine(pair, policy=Fixed(3), kv_memory_bytes=bytes_for(pair, 2 * KEY_BLOCK))
    (prompt,) = prompts((232,))
    (done,) = engine.generate([Request("a", prompt, GREEDY)])
    assert len(done.output_ids) == 24


def test_slots_bound_the_live_rows_and_are_kept_full(pair: TinyPair) -> None:
    engine = Engine(pair, policy=Fixed(2), slots=3)
    for request in requests_of(SOME, GREEDY):
        engine.submit(request)
    assert (engine.live, engine.waiting) == (0, len(SOME))
    finished = 0
    while engine.has_work:
        finished += len(engine.step())
        assert engine.live <= 3
        assert engine.live + engine.waiting + finished == len(SOME)
    assert engine.stats.live_rows / engine.stats.rounds > 2.5


def test_requests_submitted_while_others_run_change_nothing(
    pair: TinyPair, reference: Reference
) -> None:
    engine = Engine(
        replace(pair, eos_token_ids=frozenset({reference.eos})), policy=Fixed(3), slots=4
    )
    todo = requests_of(reference.prompts, GREEDY)
    done: dict[str, Prompt] = {}
    while todo or engine.has_work:
        if todo:
            engine.submit(todo.pop(0))
        done.update({each.id: each.output_ids for each in engine.step()})
    assert [done[f"r{i}"] for i in range(len(done))] == reference.outputs


def test_an_engine_can_be_used_again(pair: TinyPair, reference: Reference) -> None:
    engine = Engine(
        replace(pair, eos_token_ids=frozenset({reference.eos})), policy=Fixed(3), slots=4
    )
    for _ in range(2):
        done = engine.generate(requests_of(reference.prompts, GREEDY))
        assert outputs(done) == reference.outputs


@pytest.mark.parametrize("context", [1, 20, 60, 110])
def test_rows_that_outgrow_the_draft_go_on_without_it(
    pair: TinyPair, reference: Reference, context: int
) -> None:
    short = replace(pair, draft_context_length=context, eos_token_ids=frozenset({reference.eos}))
    engine = Engine(short, policy=Fixed(4), slots=4, prefill_chunk=64)
    assert outputs(engine.generate(requests_of(reference.prompts, GREEDY))) == reference.outputs
    assert max(engine.drafter.cache.lengths) <= context
    for request, done in zip(
        reference.prompts, engine.generate(requests_of(reference.prompts, GREEDY)), strict=True
    ):
        if len(request) >= context:
            assert done.counts.drafted == 0


def test_models_with_padded_vocabularies_never_yield_padding(target_model: PreTrainedModel) -> None:
    """The engine uses the token ids that both models know."""
    pair = replace(make_pair(target_model, target_model), vocab_size=40)
    engine = Engine(pair, policy=Fixed(3), verification="coupled")
    many = [tuple(token % 40 for token in prompt) for prompt in SOME]
    done = engine.generate(requests_of(many, replace(SAMPLED, top_p=1.0, temperature=2.0)))
    assert max(token for output in outputs(done) for token in output) < 40
    assert engine.stats.counts.acceptance_rate == 1.0
