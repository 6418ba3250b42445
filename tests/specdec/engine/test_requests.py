"""What the engine serves, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from specdec.engine.engine import Engine
from specdec.policies.simple import Fixed
from specdec.request import Counts, InvalidRequest, Request, SamplingParams
from tests.specdec.engine.references import Reference, letters
from tests.specdec.tiny_models import VOCAB, TinyPair
from tests.specdec.workloads import (
    GREEDY,
    SAMPLED,
    SOME,
    outputs,
    requests_of,
)

LONG = (1,) * 1024


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("x", ()), "no tokens"),
        (Request("x", LONG), "1024 tokens.*context of 1024"),
        (Request("x", (5, VOCAB)), f"outside the vocabulary of {VOCAB}"),
        (Request("x", (5, -1)), "outside the vocabulary"),
        (Request("x", (5,), SamplingParams(stop=("a",))), "decode"),
    ],
    ids=["empty", "too long", "unknown token", "negative token", "stop without decode"],
)
def test_a_request_that_cannot_be_served_is_its_own_error(
    pair: TinyPair, reference: Reference, request_: Request, message: str
) -> None:
    good = requests_of(reference.prompts[:5], replace(GREEDY, ignore_eos=True))
    engine = Engine(pair, policy=Fixed(2), slots=2)
    done = engine.generate([*good[:2], request_, *good[2:]])
    bad = done.pop(2)
    assert (bad.id, bad.finish_reason, bad.output_ids) == ("x", "error", ())
    assert bad.prompt_tokens == len(request_.prompt_ids)
    assert bad.counts == Counts()
    assert bad.error is not None

    assert re.search(message, bad.error), bad.error
    assert outputs(done) == outputs(Engine(pair, policy=Fixed(2), slots=2).generate(good))


def test_an_error_comes_back_even_if_nothing_else_runs(pair: TinyPair) -> None:
    engine = Engine(pair, policy=Fixed(2))
    engine.submit(Request("x", ()))
    assert engine.has_work
    assert [each.id for each in engine.step()] == ["x"]
    assert not engine.has_work
    assert engine.step() == []


ODD = [
    {"temperature": 1e-38},
    {"temperature": 1e-300},
    {"temperature": 1e300},
    {"top_k": 2**63},
    {"top_p": 1e-300},
    {"min_p": 1},
    {"seed": -(2**200)},
    {"max_new_tokens": 10**30},
    {"stop": (5,)},
    {"stop_token_ids": (None, "a")},
    {"stop_token_ids": (2**70,)},
]


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("odd", ODD, ids=str)
def test_what_sampling_params_accept_the_engine_serves(
    pair: TinyPair, odd: dict[str, object], mode: str
) -> None:
    """One row's odd value must never be the end of the other rows."""
    try:
        sampling = SamplingParams(**({"max_new_tokens": 5} | odd))  # type: ignore[arg-type]
    except InvalidRequest:
        return
    engine = Engine(
        replace(pair, context_length=200),
        policy=Fixed(2),
        verification=mode,  # type: ignore[arg-type]
        decode=letters,
    )
    normal = replace(SAMPLED, max_new_tokens=5)
    done = engine.generate([Request("a", SOME[0], sampling), Request("b", SOME[2], normal)])
    assert all(each.error is None and each.output_ids for each in done)
