"""Completions that are given are scored as plain transformers does, and disturb nobody."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.model.pages import PAGE
from specdec.policies.simple import Fixed
from specdec.request import INVALID_LOGITS, Completion, Request, SamplingParams
from tests.specdec.engine.test_memory import bytes_for
from tests.specdec.tiny_models import VOCAB, TinyPair, make_pair
from tests.specdec.workloads import SAMPLED, SOME

ONE_PROMPT = tuple(range(40))
GIVEN = [
    (SOME[0], SOME[1]),  # over several chunks
    (SOME[1], (5,)),
    ((5,), SOME[2]),
    (ONE_PROMPT, SOME[4]),
    (ONE_PROMPT, SOME[4]),
    (ONE_PROMPT, (*SOME[4][:9], 3)),
    ((3,), (4,)),
]
"""Prompts and completions."""


def scored(logprobs: int | None = None) -> list[Request]:
    asked = SamplingParams(logprobs=logprobs)
    return [Request(f"s{i}", *pair[:1], asked, pair[1]) for i, pair in enumerate(GIVEN)]


def check(model: PreTrainedModel, request: Request, done: Completion) -> None:
    """It has the log-likelihood of plain transformers, over the whole text at once."""
    assert (done.finish_reason, done.output_ids) == ("stop", ())
    assert done.prompt_tokens == len(request.prompt_ids)
    text = torch.tensor([[*request.prompt_ids, *request.given_ids]])
    with torch.inference_mode():
        log_p = model(text).logits[0, len(request.prompt_ids) - 1 : -1].double().log_softmax(-1)
    assert done.logprobs is not None
    assert [told.token for told in done.logprobs] == list(request.given_ids)
    own = log_p.gather(1, torch.tensor(request.given_ids)[:, None])[:, 0]
    assert [told.logprob for told in done.logprobs] == pytest.approx(own.tolist(), abs=1e-3)
    count = request.sampling.logprobs or 0
    for told, row in zip(done.logprobs, log_p, strict=True):
        assert [v for _, v in told.top] == pytest.approx(row.topk(count).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("invariant", [False, True])
def test_scores_are_those_of_plain_transformers(
    target_model: PreTrainedModel, invariant: bool, slots: int
) -> None:
    precision = "float32" if invariant else "plain"
    pair = make_pair(target_model, None, precision=precision, invariant=invariant)
    engine = Engine(pair, policy=Fixed(0), slots=slots, prefill_chunk=32)
    asked = scored(None if slots == 3 else 2)
    for request, done in zip(asked, engine.generate(asked), strict=True):
        check(target_model, request, done)
    assert engine.stats.counts.committed == 0
    assert engine.stats.target_forwards > 0


def test_rows_beside_them_have_the_tokens_that_they_have_alone(
    pair: TinyPair, target_model: PreTrainedModel
) -> None:
    plain = [Request(f"r{i}", prompt, replace(SAMPLED, seed=i)) for i, prompt in enumerate(SOME)]

    def run(requests: list[Request]) -> dict[str, Completion]:
        engine = Engine(pair, policy=Fixed(2), verification="coupled", slots=4, prefill_chunk=32)
        return {done.id: done for done in engine.generate(requests)}

    alone = run(plain)
    mixed = [*plain[:5], *scored(1)[:4], *plain[5:], *scored(1)[4:]]
    found = run(mixed)
    for request in mixed:
        if request.given_ids:
            check(target_model, request, found[request.id])
        else:
            assert found[request.id].output_ids == alone[request.id].output_ids


def test_what_cannot_be_scored_is_an_error_of_its_row(target_model: PreTrainedModel) -> None:
    sick = copy.deepcopy(target_model)
    sick.get_input_embeddings().weight.data[VOCAB - 1] = float("nan")
    pair = make_pair(sick, None)
    ask = SamplingParams()
    asked = [
        Request("odd", (5, VOCAB - 1), ask, (6, 7)),
        Request("good", (5, 6), ask, (7, 8)),
        Request("long", (5,) * pair.context_length, ask, (7,)),
        Request("none", (5,), ask, (VOCAB,)),
        # The last token is read by nothing.
        Request("last", (5,), ask, (6, VOCAB - 1)),
    ]
    odd, good, long, none, last = Engine(pair, policy=Fixed(0), slots=8).generate(asked)
    assert (odd.error_class, odd.logprobs) == (INVALID_LOGITS, ())
    assert "context is of" in str(long.error)
    assert "outside the vocabulary" in str(none.error)
    for request, done in ((asked[1], good), (asked[4], last)):
        assert done.finish_reason == "stop"
        assert done.logprobs is not None
        assert len(done.logprobs) == len(request.given_ids)


@pytest.mark.parametrize("pages", [9, 10, 11, 12, 20])
def test_one_that_cannot_be_scored_costs_others_of_its_prompt_no_more_than_a_step(
    target_model: PreTrainedModel, pages: int
) -> None:
    """They share pages, of which there are hardly enough for each to have its own."""
    pair = make_pair(copy.deepcopy(target_model), None)
    pair.target.model.get_input_embeddings().weight.data[VOCAB - 1] = float("nan")
    prompt, ask = tuple(range(64)) * 4, SamplingParams(logprobs=0)
    engine = Engine(pair, policy=Fixed(0), slots=4, kv_memory_bytes=bytes_for(pair, pages * PAGE))
    given = [(11,) * 20, (*(12,) * 10, VOCAB - 1, *(12,) * 9), (13,) * 20, (14,) * 20]
    asked = [Request(f"s{i}", prompt, ask, each) for i, each in enumerate(given)]
    first = engine.generate(asked[:1])
    for request, done in zip(asked, [*first, *engine.generate(asked[1:])], strict=True):
        if VOCAB - 1 in request.given_ids:
            assert done.error_class == INVALID_LOGITS
        else:
            check(target_model, request, done)
