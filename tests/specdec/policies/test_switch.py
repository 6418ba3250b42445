from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from specdec.policies.base import RoundOutcome
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.estimators import online_estimator
from specdec.policies.goodput import Goodput
from specdec.policies.measuring import LearntCosts
from specdec.policies.memory import RowMemory
from specdec.policies.objective import leading_rows
from specdec.policies.switch import IN_A_ROW, PROBE_SHARE, REST
from tests.specdec.policies.worlds import (
    CHEAP,
    COSTLY,
    FLAT,
    STEEP,
    World,
    policy_of,
    world,
)
from tests.specdec.workloads import (
    linear,
    memories,
    round_start,
)


@pytest.mark.parametrize("free_trimming", [True, False], ids=["matching", "rejection"])
@pytest.mark.parametrize(
    ("rates", "draft", "verify"),
    [([0.02] * 6, CHEAP, FLAT), ([0.7] * 6, COSTLY, FLAT), ([0.7] * 6, CHEAP, STEEP)],
    ids=["useless draft", "costly draft", "costly verification"],
)
def test_speculation_that_does_not_pay_switches_itself_off(
    rates: list[float], draft: CostTable, verify: CostTable, free_trimming: bool
) -> None:
    done = world(rates, draft, verify, free_trimming=free_trimming).run(1000)
    plain = len(rates) / float(verify(len(rates)))
    assert done.speculating(500) < 0.2
    assert done.goodput(500) > 0.975 * plain


@pytest.mark.parametrize("free_trimming", [True, False], ids=["matching", "rejection"])
def test_probes_are_a_small_share_of_time_and_never_end(free_trimming: bool) -> None:
    done = world([0.02] * 6, CHEAP, FLAT, free_trimming=free_trimming).run(3000)
    plain = float(FLAT(6))
    tail = range(1000, 3000)
    extra = sum(done.seconds[i] - plain for i in tail) / sum(done.seconds[i] for i in tail)
    assert 0.3 * PROBE_SHARE < extra < 1.5 * PROBE_SHARE
    probes = [i for i in tail if any(done.drafted[i])]
    assert len(probes) > 20 and max(np.diff(probes)) < 3 * np.mean(np.diff(probes))


@pytest.mark.parametrize("free_trimming", [True, False], ids=["matching", "rejection"])
def test_speculation_resumes_when_it_pays_again(free_trimming: bool) -> None:
    done = world([0.02] * 6, CHEAP, FLAT, free_trimming=free_trimming).run(400)
    assert done.speculating(200) < 0.2
    done.rates = [0.9] * 6
    done.run(300)
    assert done.speculating(100) > 0.9
    assert done.goodput(100) > 2 * 6 / float(FLAT(6))


@pytest.mark.parametrize("rows", [1, 8])
def test_a_draft_of_which_nothing_is_known_is_tried_until_enough_is(rows: int) -> None:
    draft, verify = linear(0.6, 0.01), linear(1.0, 0.05)
    better_than_thought = world([0.9] * rows, draft, verify).run(60)
    assert better_than_thought.speculating(30) > 0.9
    as_bad_as_feared = world([0.3] * rows, draft, verify).run(200)
    assert as_bad_as_feared.speculating(100) < 0.1
    assert as_bad_as_feared.goodput(200) > 0.9 * rows / float(verify(rows))


class Deaf(Goodput):
    """`goodput` whose tables leave `hidden` seconds of each draft step out, and never learn."""

    hidden = 0.0

    def observe(self, outcome: RoundOutcome) -> None:
        costly = [(tokens, seconds + self.hidden) for tokens, seconds in outcome.draft_costs]
        super().observe(replace(outcome, draft_costs=costly))
        self._learnt = LearntCosts(self.costs)  # what was noted is gone


def test_what_promises_leave_out_is_seen_in_what_they_yield() -> None:
    policy = Deaf(online_estimator("confidence"), None, CostModel(CHEAP, linear(1.0, 0.05)), 12)
    done = World(policy, [0.6] * 6).run(200)
    assert done.speculating(100) > 0.9
    policy.hidden = 1.0  # as much as a forward of the target
    done.run(600)
    assert done.speculating(200) < 0.2
    policy.hidden = 0.0
    done.run(3000)
    assert done.speculating(200) > 0.9


@pytest.mark.parametrize(("rate", "rounds"), [(0.25, 300 / IN_A_ROW), (0.9, 0)])
def test_a_round_without_candidates_comes_now_and_then_where_it_is_close(
    rate: float, rounds: float
) -> None:
    done = world([rate] * 6, CHEAP, linear(1.0, 0.01)).run(500)
    assert done.speculating(300) > 0.9
    assert sum(not any(each) for each in done.drafted[-300:]) == pytest.approx(rounds, abs=1)


def test_a_decision_against_speculation_stands_while_rows_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, asked = policy_of(COSTLY, STEEP), [0]
    policy.switch.allowance = 0.0
    policy._judged = policy._accepted = 1000.0  # of which enough is known

    def counting(*arguments: Any) -> tuple[int, int, float]:
        asked[0] += 1
        return leading_rows(*arguments)

    monkeypatch.setattr("specdec.policies.growing.leading_rows", counting)
    rows = memories(4)
    for _ in range(2 * (REST + 1)):
        assert policy.budget(round_start(rows)) == [0] * 4
    assert asked == [2]
    policy.budget(round_start(rows))
    policy.budget(round_start([*rows[1:], RowMemory()]))
    assert asked == [4]
