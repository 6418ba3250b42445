from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specdec.policies.catch_up import CATCH_UP_ROUNDS, USUAL, owed, shared
from specdec.policies.costs import CostTable
from specdec.policies.memory import RowMemory
from tests.specdec.policies.worlds import (
    CHEAP,
    FLAT,
    policy_of,
    world,
)
from tests.specdec.workloads import (
    memories,
    outcome,
    round_start,
)


def test_feeding_the_draft_what_it_missed_is_an_investment() -> None:
    """1.5 seconds of catching up are more than one round gains, and less than eight rounds do."""
    done = world([0.02] * 6, CHEAP, FLAT).run(100)  # spends the first probe, which is free
    done.rates = [0.9] * 6
    done.run(300)
    for pending, rows in ((1, 6), (250, 6), (10_000, 0)):  # a probe would be 4 rows
        budget = done.policy.budget(round_start(done.rows, pending=pending))
        assert np.count_nonzero(budget) == rows


@pytest.mark.parametrize(("owed", "speculating"), [(0.0, 6), (0.03, 0)])
def test_rows_whose_prompts_were_read_still_owe_for_it(owed: float, speculating: int) -> None:
    """One row more is worth its prompt, if others speculate anyway; all six are not.

    All six gain what 0.6 seconds yield without candidates, at the price of 0.5, so that each may
    owe 0.017 a round. The sixth row's prompt takes two seconds, for the 62 rounds it has left.
    """
    verify = CostTable([1, 6, 7, 4096], [1.0, 1.0, 1.5, 1.5])
    draft = CostTable([1, 6, 100], [0.001, 0.001, 2.0])
    policy = policy_of(draft, verify, k_max=1)
    policy.switch.allowance = 0.0
    policy._judged, policy._accepted = 1000.0, 600.0
    start = round_start([*(RowMemory(catch_up=owed) for _ in range(5)), RowMemory()])
    start = replace(start, draft_pending=[1] * 5 + [100])
    assert np.count_nonzero(policy.budget(start)) == speculating


def test_what_a_row_lacks_is_shared_by_the_rounds_that_are_left() -> None:
    """Two rows lack 100 tokens: each reads them beside the 4 that are usual."""
    draft = CostTable([1, 400], [0.1, 40.0])
    start = replace(round_start(memories(3)), draft_pending=[100, 1, 100], room=[9, 9, 999])
    debts = owed(start, [0, 2], [0.5, 0.5, 0.5], draft)
    a_token = (draft(100 + 2 * USUAL) - draft(2 * USUAL)) / 100
    assert debts == pytest.approx(
        {0: 100 * a_token / (9 / 1.5), 2: 100 * a_token / CATCH_UP_ROUNDS}
    )
    nothing = replace(start, draft_pending=[USUAL, 1, 1])
    assert owed(nothing, [0, 2], [0.5] * 3, draft) == {0: 0.0, 2: 0.0}


def test_a_round_is_charged_what_its_rows_owe_and_not_what_it_read() -> None:
    draft = CostTable([1, 400], [0.1, 40.0])
    start = round_start([RowMemory(catch_up=owes) for owes in (0.25, 0.5, 8.0)])
    costs = [(200, 20.0), (2, 0.2)]
    this = replace(outcome(start, [2, 2, 0], [1, 0, 0]), draft_costs=costs)
    read = draft(200) - draft(2 * USUAL)
    assert shared(30.0, this, draft) == pytest.approx(30 - read + 0.75)
    usual = replace(this, draft_costs=[(2, 0.2), (2, 0.2)])
    assert shared(30.0, usual, draft) == pytest.approx(30.75)
