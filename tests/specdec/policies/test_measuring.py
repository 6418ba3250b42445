from __future__ import annotations

from dataclasses import replace

import pytest

from specdec.policies.base import RoundStart
from specdec.policies.measuring import PromptTokens
from tests.specdec.policies.worlds import linear, memories, outcome, round_start

VERIFY = linear(1.0, 0.01)


def joined(prompt: int) -> RoundStart:
    """Seven rows decode; an eighth feeds so many tokens of its prompt."""
    start = round_start(memories(8))
    decoding = [*start.decoding[:-1], False]
    return replace(start, decoding=decoding, target_tokens=7 + prompt)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_prompts_tokens_come_to_count_at_what_they_cost(share: float) -> None:
    prompts, start = PromptTokens(), joined(100)
    assert prompts.places(start, start.target_tokens) == 107
    for _ in range(100):
        done = outcome(start, [2] * 7 + [0], [1] * 7 + [0])
        tokens = start.target_tokens + 14
        seconds = float(VERIFY(21)) + share * 100 * 0.01
        prompts.observe(replace(done, verify_cost=(tokens, seconds)), VERIFY)
    assert prompts.places(start, tokens) == pytest.approx(21 + 100 * share, abs=2)


def test_prompts_alone_teach_nothing() -> None:
    """Nor do rounds without: nothing would be left of what was learnt."""
    prompts, rows = PromptTokens(), memories(2)
    alone = replace(round_start(rows), decoding=[False] * 2, target_tokens=400)
    for start in (alone, round_start(rows)):
        told = replace(outcome(start, [0] * 2, [0] * 2), verify_cost=(start.target_tokens, 0.5))
        prompts.observe(told, VERIFY)
    assert prompts.places(alone, 400) == 400


def test_a_slow_moment_of_the_machine_does_not_make_prompts_dearer_than_candidates() -> None:
    prompts, start = PromptTokens(), joined(100)
    told = replace(outcome(start, [0] * 8, [0] * 8), verify_cost=(107, 100.0))
    prompts.observe(told, VERIFY)
    assert prompts.places(start, 107) == 107


def test_where_a_prompt_should_add_nothing_noise_does_not_make_it_free() -> None:
    """As in a batch that waits for weights: beyond the knee its tokens cost what others do."""
    prompts, start, flat = PromptTokens(), joined(100), linear(1.0, 1e-5)
    for _ in range(50):
        told = replace(outcome(start, [0] * 8, [0] * 8), verify_cost=(107, 0.95))
        prompts.observe(told, flat)
    assert prompts.places(start, 107) >= 106
