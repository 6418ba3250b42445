"""Outputs end at the same token for any number of candidates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specdec.engine.engine import Engine
from specdec.policies.simple import Fixed
from specdec.request import Completion, Request, SamplingParams
from tests.specdec.engine.references import letters
from tests.specdec.tiny_models import TinyPair
from tests.specdec.workloads import (
    GREEDY,
    SOME,
    Prompt,
)

KS = (0, 1, 4, 8)


def run_with(pair: TinyPair, k: int, sampling: SamplingParams) -> Completion:
    engine = Engine(pair, policy=Fixed(k), decode=letters)
    return engine.generate([Request("a", SOME[1], sampling)])[0]


@pytest.fixture(scope="module")
def long_output(self_pair: TinyPair) -> Prompt:
    """A sampled output; `self_pair` then accepts long prefixes, so that rounds over-commit."""
    return run_coupled(self_pair, 0, FREE).output_ids


FREE = SamplingParams(temperature=1.0, max_new_tokens=40, seed=77)


def run_coupled(pair: TinyPair, k: int, sampling: SamplingParams) -> Completion:
    engine = Engine(pair, policy=Fixed(k), verification="coupled", decode=letters)
    return engine.generate([Request("a", SOME[1], sampling)])[0]


def until(output: Prompt, token: int) -> Prompt:
    return output[: output.index(token) + 1]


@pytest.mark.parametrize("at", [0, 1, 5, 6, 13])
def test_output_ends_with_the_first_end_of_sequence_for_any_k(
    self_pair: TinyPair, long_output: Prompt, at: int
) -> None:
    eos = long_output[at]
    for k in KS:
        pair = replace(self_pair, eos_token_ids=frozenset({eos}))
        done = run_coupled(pair, k, FREE)
        assert done.output_ids == until(long_output, eos)
        assert (done.finish_reason, done.stop_reason) == ("stop", eos)
        free = run_coupled(pair, k, replace(FREE, ignore_eos=True))
        assert (free.output_ids, free.finish_reason) == (long_output, "length")


@pytest.mark.parametrize("at", [0, 2, 7])
def test_output_ends_with_the_first_stop_token_for_any_k(
    self_pair: TinyPair, long_output: Prompt, at: int
) -> None:
    stop = long_output[at]
    for k in KS:
        done = run_coupled(self_pair, k, replace(FREE, stop_token_ids=(stop, 9999)))
        assert done.output_ids == until(long_output, stop)
        assert (done.finish_reason, done.stop_reason) == ("stop", stop)


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (3, 5), (6, 12)])
def test_output_ends_with_the_token_that_completes_a_stop_string_for_any_k(
    self_pair: TinyPair, long_output: Prompt, begin: int, end: int
) -> None:
    text = letters(long_output)
    stop = text[begin:end]
    for k in KS:
        done = run_coupled(self_pair, k, replace(FREE, stop=("\x00", stop)))
        assert letters(done.output_ids) == text[: text.index(stop) + len(stop)]
        assert (done.finish_reason, done.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 6, 11])
def test_output_ends_at_max_new_tokens_for_any_k(
    self_pair: TinyPair, long_output: Prompt, most: int
) -> None:
    for k in KS:
        done = run_coupled(self_pair, k, replace(FREE, max_new_tokens=most))
        assert done.output_ids == long_output[:most]
        assert (done.finish_reason, done.stop_reason) == ("length", None)


def test_output_ends_where_the_context_does(pair: TinyPair) -> None:
    short = replace(pair, context_length=110, draft_context_length=110)
    for k in KS:
        done = run_with(short, k, GREEDY)
        assert (len(done.output_ids), done.finish_reason) == (10, "length")
        assert done.prompt_tokens == 100
