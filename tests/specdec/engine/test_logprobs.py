"""Log-probabilities are the target's, whether a token was verified or decoded alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.policies.simple import Fixed
from specdec.request import Completion, Request, SamplingParams
from tests.specdec.adjustments import adjusted_by_hand
from tests.specdec.goodness import reference_distribution
from tests.specdec.tiny_models import TinyPair, make_pair
from tests.specdec.workloads import GREEDY, SAMPLED, SOME

KINDS: list[dict[str, Any]] = [
    {"logprobs": 0},
    {"logprobs": 5},
    {"logprobs": 3, "temperature": 0},
    {"logprobs": 3, "logprobs_mode": "processed_logprobs", "frequency_penalty": 1.5},
    {"logprobs": 2, "logprobs_mode": "processed_logprobs", "temperature": 0, "logit_bias": {3: 4}},
    {"logprobs": 4, "logprobs_mode": "raw_logprobs", "frequency_penalty": 1.5},
    {},
]


def requests() -> list[Request]:
    """A request of each kind."""
    return [
        Request(f"r{i}", prompt, replace(SAMPLED, seed=i, **kind))
        for i, (prompt, kind) in enumerate(zip(SOME, KINDS, strict=False))
    ]


@torch.inference_mode()
def expected(model: PreTrainedModel, request: Request, output: tuple[int, ...]) -> torch.Tensor:
    """float64 [n, V]: by plain transformers, over the whole text at once."""
    text, begin = torch.tensor([[*request.prompt_ids, *output]]), len(request.prompt_ids)
    logits = model(text).logits[0, begin - 1 : -1].double()
    asked = request.sampling
    if asked.logprobs_mode == "raw_logprobs":
        return logits.log_softmax(-1)
    rows = [
        adjusted_by_hand(row, request.prompt_ids, output[:at], asked)
        for at, row in enumerate(logits)
    ]
    if asked.temperature == 0:
        return torch.stack(rows).log_softmax(-1)
    return torch.stack([reference_distribution(row, asked) for row in rows]).log()


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("k", [0, 4])
def test_they_are_those_of_plain_transformers(
    pair: TinyPair, target_model: PreTrainedModel, k: int, mode: str
) -> None:
    """In one batch, rows that want none among them; also of a row that a stop cut short."""
    asked = requests()
    (free,) = Engine(pair, policy=Fixed(k)).generate([replace(asked[2], id="free")])
    stop = free.output_ids[7]
    asked[2] = replace(asked[2], sampling=replace(asked[2].sampling, stop_token_ids=(stop,)))
    engine = Engine(pair, policy=Fixed(k), verification=mode, slots=4)  # type: ignore[arg-type]
    for request, done in zip(asked, engine.generate(asked), strict=True):
        wanted = request.sampling.logprobs
        if wanted is None:
            assert done.logprobs is None
            continue
        assert done.logprobs is not None
        assert [each.token for each in done.logprobs] == list(done.output_ids)
        log_p = expected(target_model, request, done.output_ids)
        for each, row in zip(done.logprobs, log_p, strict=True):
            assert each.logprob == pytest.approx(row[each.token].item(), abs=1e-3)
            assert len(each.top) == wanted
            for (token, value), best in zip(each.top, row.topk(wanted).values, strict=True):
                assert value == pytest.approx(best.item(), abs=1e-3) or not math.isfinite(value)
                assert value == pytest.approx(row[token].item(), abs=1e-3)


def test_they_are_the_same_bits_in_any_company(
    target_model: PreTrainedModel, draft_model: PreTrainedModel
) -> None:
    """With batch-invariant kernels: verified among others, or decoded alone."""
    pair = make_pair(target_model, draft_model, precision="int8", invariant=True)
    asked = [
        Request(str(i), prompt, replace(GREEDY, max_new_tokens=12, logprobs=3))
        for i, prompt in enumerate(SOME[:6])
    ]

    def run(k: int, slots: int) -> list[Completion]:
        return Engine(pair, policy=Fixed(k), slots=slots).generate(asked)

    alone = [done.logprobs for done in run(0, 1)]
    assert alone[0]
    for k, slots in ((0, 6), (4, 1), (4, 6)):
        assert [done.logprobs for done in run(k, slots)] == alone, (k, slots)


@pytest.mark.parametrize("invariant", [False, True])
def test_those_of_prompts_are_transformers_own_and_change_nothing_else(
    target_model: PreTrainedModel, draft_model: PreTrainedModel, invariant: bool
) -> None:
    """Prompts of one token and of several chunks, rows that share them and that want none."""
    pair = make_pair(
        target_model,
        draft_model,
        precision="float32" if invariant else "plain",
        invariant=invariant,
    )
    prompts = [(5,), *SOME[:3], SOME[1], SOME[1]]
    asked = [
        Request(str(i), prompt, replace(GREEDY, max_new_tokens=6, prompt_logprobs=wanted))
        for i, (prompt, wanted) in enumerate(zip(prompts, (2, 0, 3, None, None, 1), strict=True))
    ]

    def run(requests: list[Request]) -> list[Completion]:
        return Engine(pair, policy=Fixed(2), slots=3, prefill_chunk=32).generate(requests)

    done = run(asked)
    plain = [replace(r, sampling=replace(r.sampling, prompt_logprobs=None)) for r in asked]
    assert [each.output_ids for each in done] == [each.output_ids for each in run(plain)]
    for request, each in zip(asked, done, strict=True):
        wanted = request.sampling.prompt_logprobs
        if wanted is None:
            assert each.prompt_logprobs is None
            continue
        assert each.prompt_logprobs is not None and each.prompt_logprobs[0] is None
        told = [one for one in each.prompt_logprobs if one is not None]
        assert [one.token for one in told] == list(request.prompt_ids[1:])
        with torch.inference_mode():
            log_p = target_model(torch.tensor([request.prompt_ids])).logits[0].log_softmax(-1)
        for one, row in zip(told, log_p, strict=False):
            assert one.logprob == pytest.approx(row[one.token].item(), abs=1e-3)
            best = row.topk(wanted).values.tolist()
            assert [value for _, value in one.top] == pytest.approx(best, abs=1e-3)


def test_an_engine_whose_rows_want_none_reads_none(pair: TinyPair) -> None:
    engine = Engine(pair, policy=Fixed(2))
    engine.submit(Request("a", SOME[0], SamplingParams(max_new_tokens=4)))
    engine.step()
    assert engine._asked.by(engine.scheduler.rows).reader is None
