from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from specdec.policies import profiling
from specdec.policies.costs import CostTable
from specdec.policies.profiling import CONTEXT, LEAST_POINTS, PROMPT, profile_costs
from tests.specdec.tiny_models import TinyPair


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_a_profile_covers_the_rounds_that_are_to_come(pair: TinyPair, slots: int) -> None:
    """Draft steps of all rows, a prompt to catch up with; verifications of 8 candidates a row."""
    assert pair.draft is not None
    model = profile_costs(pair.target, pair.draft, slots, seconds=60)
    for table, most in ((model.draft, max(2 * slots, PROMPT)), (model.verify, 9 * slots)):
        assert table.tokens[0] == 1 and (np.diff(table.tokens) > 0).all()
        assert most / 1.6 < table.tokens[-1] <= most
        assert (table.seconds > 0).all()


def test_a_profile_without_time_is_short_but_of_use(pair: TinyPair) -> None:
    assert pair.draft is not None
    model = profile_costs(pair.target, pair.draft, 64, seconds=0)
    for table in (model.draft, model.verify):
        tokens = table.tokens.tolist()
        assert len(tokens) == LEAST_POINTS and tokens[0] == 1 and tokens[-1] > 64
        assert (table.seconds > 0).all()


def test_what_a_cached_position_costs_is_measured(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(_: Any, __: Any, slots: int, tokens: int, context: int = CONTEXT) -> float:
        return 1e-3 + 1e-6 * context * min(slots, tokens)

    monkeypatch.setattr(profiling, "_time", seconds)
    table = profiling._profile(pair.target, 8, 16, budget=0.1)
    assert table.position == pytest.approx(1e-6) and table.context == CONTEXT
    assert float(table(8)) == pytest.approx(1e-3 + 8e-6 * CONTEXT)


class Machine:
    """Takes made-up seconds for forwards, which differ by `noise`; its speed wanders by a tenth."""

    def __init__(self, seconds: Callable[[int], float], noise: float, seed: int) -> None:
        self._seconds, self._noise, self._clock = seconds, noise, 0.0
        self._random = np.random.default_rng(seed)
        self._phase = self._random.uniform(0, 6)

    def perf_counter(self) -> float:
        return self._clock

    def forward(self, _: Any, __: Any, ___: int, tokens: int, ____: int = CONTEXT) -> float:
        speed = 1 + 0.1 * np.sin(self._phase + 2 * self._clock)
        spent = self._seconds(tokens) * float(speed * self._random.lognormal(0, self._noise))
        self._clock += spent
        return spent


def profiles(
    pair: TinyPair,
    monkeypatch: pytest.MonkeyPatch,
    seconds: Callable[[int], float],
    slots: int,
    noise: float,
) -> list[CostTable]:
    """Tables of the target, profiled beside a draft, on machines like each other."""
    tables = []
    for seed in range(30):
        machine = Machine(seconds, noise, seed)
        monkeypatch.setattr(profiling, "_time", machine.forward)
        monkeypatch.setattr(profiling, "time", machine)
        tables.append(profile_costs(pair.target, pair.draft, slots).verify)
    return tables


def test_few_noisy_timings_do_not_make_candidates_free(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token takes 4 ms: there is time for a timing or two of each size that rounds may have.

    Tables of these would take further tokens for anything from a fifth to twice as dear.
    """
    tables = profiles(pair, monkeypatch, lambda n: 0.02 + 0.004 * n, 64, 0.08)
    dearer = [float(each(80) - each(64)) / (0.004 * 16) for each in tables]
    assert min(dearer) > 0.4
    assert np.std(dearer) < 0.25
    # A candidate for each row, to which all in between goes, is among what was timed.
    assert all({1, 64, 128} <= {*each.tokens} for each in tables)


@pytest.mark.parametrize("noise", [0.05, 0.1])
def test_what_noise_alone_tells_apart_is_not(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, noise: float
) -> None:
    """By differences between sizes a policy decides; medians of single sizes are too far off."""

    def errors(tables: list[CostTable]) -> float:
        found = [float(each(n + n // 4) / each(n)) for each in tables for n in range(16, 64, 4)]
        due = [seconds(n + n // 4) / seconds(n) for _ in tables for n in range(16, 64, 4)]
        return float(np.sqrt(np.mean(np.square(np.subtract(found, due)))))

    def seconds(n: int) -> float:
        return 0.010 + 0.0008 * n

    smooth = errors(profiles(pair, monkeypatch, seconds, 16, noise))
    monkeypatch.setattr(profiling, "_smooth", lambda _, y, __: y)
    assert smooth < 0.7 * errors(profiles(pair, monkeypatch, seconds, 16, noise))


def test_where_there_is_time_each_step_of_a_staircase_is_found(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(n: int) -> float:
        return 0.002 * -(-n // 8)

    for table in profiles(pair, monkeypatch, seconds, 16, 0.01):
        ratios = table([8, 9, 16, 17, 24]) / seconds(16)
        np.testing.assert_allclose(ratios, [0.5, 1, 1, 1.5, 1.5], rtol=0.15)
