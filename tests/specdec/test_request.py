from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.request import Completion, Counts, InvalidRequest, Request, SamplingParams

INVALID = [
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", 2.0),
    ("max_new_tokens", True),
    ("max_new_tokens", None),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "1"),
    ("temperature", None),
    ("temperature", True),
    ("top_k", -1),
    ("top_k", 1.5),
    ("top_k", False),
    ("top_p", 0.0),
    ("top_p", -0.5),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("min_p", math.nan),
    ("seed", 1.0),
    ("seed", "7"),
    ("stop", ("ok", "")),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", True),
    ("logit_bias", {5: 101}),
    ("logit_bias", {"5": 1}),
    ("logit_bias", {5: math.nan}),
    ("min_tokens", -1),
    ("min_tokens", 257),
    ("bad_words", ("",)),
    ("bad_words", ((),)),
    ("bad_words", "word"),
    ("allowed_token_ids", ()),
    ("allowed_token_ids", (1.5,)),
    ("no_repeat_ngram_size", 65),
]


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_an_invalid_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name} must be .*{re.escape(repr(value))}$"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 100.0, "top_k": 0, "top_p": 1, "min_p": 1},
        {"seed": -(2**70), "max_new_tokens": 1},
        {"repetition_penalty": 0.1, "presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {0: -100, 1: 100}, "min_tokens": 256, "no_repeat_ngram_size": 64},
        {"bad_words": ("a", (1, 2)), "allowed_token_ids": (0,)},
        {"top_p": 1e-9, "min_p": 0, "stop": ("a", "bc"), "stop_token_ids": (0,)},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_valid(params: dict[str, Any]) -> None:
    assert SamplingParams(**params)


def test_what_goes_in_and_out_is_frozen() -> None:
    values = (SamplingParams(), Request("a", (1,)), Completion("a", 1, (), "stop"))
    for value in values:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, 3)


numbers = st.integers(0, 1000)
counts = st.builds(Counts, numbers, numbers, numbers, numbers, numbers)


@given(one=counts, other=counts)
def test_counts_add_up_field_by_field(one: Counts, other: Counts) -> None:
    expected = {
        f.name: getattr(one, f.name) + getattr(other, f.name) for f in dataclasses.fields(Counts)
    }
    one.add(other)
    assert dataclasses.asdict(one) == expected


def test_ratios_are_none_where_nothing_was_counted() -> None:
    assert (Counts().acceptance_rate, Counts().block_efficiency) == (None, None)
    counts = Counts(rounds=4, drafted=20, verified=16, accepted=8, committed=12)
    assert (counts.acceptance_rate, counts.block_efficiency) == (0.5, 3.0)


def test_completions_do_not_share_their_counts() -> None:
    one, other = (Completion(name, 1, (), "stop") for name in "ab")
    one.counts.add(Counts(rounds=1))
    assert other.counts == Counts()
