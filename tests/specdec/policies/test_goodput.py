from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.measure.calibration import Array
from specdec.policies.base import Signal
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.estimators import online_estimator
from specdec.policies.goodput import Goodput
from tests.specdec.policies.worlds import (
    CHEAP,
    FLAT,
    FREE,
    World,
    best_fixed,
    drafted,
    policy_of,
    world,
)
from tests.specdec.tiny_models import TinyPair
from tests.specdec.workloads import (
    Known,
    StatedGoodput,
    draft_step,
    linear,
    memories,
    outcome,
    round_start,
    staircase,
)

# ------------------------------------------------------- the invariant of rejection sampling


def kept_by(policy: StatedGoodput, steps: Array, going: bool) -> list[int]:
    """Submitted counts when rows draft on as the policy says (or all of them do)."""
    rows = steps.shape[1]
    budget = policy.budget(round_start(memories(rows), free_trimming=False))
    active, counts = [row for row in range(rows) if budget[row]], [0] * rows
    for depth in range(1, len(steps) + 1):
        if not active:
            break
        columns = {
            Signal.HEAD_BEFORE: steps[depth - 1, active, 0],
            Signal.HEAD_AFTER: steps[depth - 1, active, 1],
        }
        flags = policy.go_on(draft_step(active, depth, columns))
        for row in active:
            counts[row] += 1
        if going:
            active = [row for row, on in zip(active, flags.tolist(), strict=True) if on]
    submitted = policy.submit(counts)
    assert all(0 <= k <= n for k, n in zip(submitted, counts, strict=True))
    return list(submitted)


PROBABILITY = st.floats(0.02, 0.98)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.lists(st.tuples(PROBABILITY, PROBABILITY), min_size=4, max_size=4),
        min_size=3,
        max_size=3,
    ),
    other=st.lists(PROBABILITY, min_size=4, max_size=4),
    depth=st.integers(0, 2),
    rise=st.sampled_from([0.1, 0.3, 0.6]),
)
def test_whether_a_candidate_is_submitted_does_not_depend_on_it(
    steps: list[list[tuple[float, float]]], other: list[float], depth: int, rise: float
) -> None:
    """Redraw every row's y_k: none of the decisions about y_1..y_k may change.

    All rows' y_k are redrawn, which is more than the invariant asks for.
    """
    first = np.array(steps)
    second = first.copy()
    second[depth, :, 1] = other
    counts = [
        kept_by(policy_of(linear(0.01, 0.0), staircase(6, rise)), each, going=True)
        for each in (first, second)
    ]
    one, two = (np.minimum(each, depth + 1).tolist() for each in counts)
    assert one == two


HOPE, DRAWN = [[0.9, 0.1, 0.8, 0.2]], [[0.05, 0.95, 0.05, 0.95]]


@pytest.mark.parametrize(
    ("free_trimming", "submitted"), [(False, [1, 0, 1, 0]), (True, [0, 1, 0, 1])]
)
def test_only_matching_modes_trim_by_what_was_drawn(
    free_trimming: bool, submitted: list[int]
) -> None:
    """A token of verification is worth 4 / 1.4 * 0.1 = 0.29 committed ones."""
    policy = policy_of(FREE, linear(1.0, 0.1))
    each = drafted(policy, DRAWN, before=HOPE, free_trimming=free_trimming)
    assert each == [1, 1, 1, 1]
    assert policy.submit(each) == submitted


def test_a_trimmed_candidate_ends_its_row() -> None:
    policy = policy_of(FREE, linear(1.0, 0.1))
    policy.budget(round_start(memories(4), free_trimming=False))
    columns = {Signal.HEAD_BEFORE: HOPE[0], Signal.HEAD_AFTER: [0.95] * 4}
    assert policy.go_on(draft_step(range(4), 1, columns)).tolist() == [True, False, True, False]


# ---------------------------------------------------------------------- rounds in a row


@pytest.mark.parametrize("free_trimming", [True, False], ids=["matching", "rejection"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("rate", [0.4, 0.9])
@pytest.mark.parametrize(
    "verify", [FLAT, staircase(16, 0.3), linear(1.0, 0.05)], ids=["flat", "staircase", "sloping"]
)
def test_goodput_comes_near_the_best_fixed_k_without_being_told(
    rate: float, rows: int, verify: CostTable, free_trimming: bool
) -> None:
    """All rows and candidates are alike here, so that a fixed K is as good as any policy."""
    done = world([rate] * rows, CHEAP, verify, free_trimming=free_trimming).run(300)
    assert done.goodput(200) > 0.9 * best_fixed(rate, rows, CHEAP, verify)


def test_as_much_is_verified_as_the_best_fixed_k_would() -> None:
    """A second is worth what speculation yields, not what plain rounds do: that drafts too much."""
    rates, verify = [0.8] * 6, linear(1.0, 0.1)
    done = world(rates, CHEAP, verify).run(300)
    paces = [best_fixed(0.8, 6, CHEAP, verify, [k]) for k in range(13)]
    assert float(np.mean(done.verified[-200:])) == pytest.approx(int(np.argmax(paces)), abs=0.75)


def test_a_pause_of_the_machine_is_soon_forgotten() -> None:
    done = world([0.8] * 6, CHEAP, linear(1.0, 0.1)).run(300)
    usual = float(np.mean(done.verified[-200:]))
    costs = done.policy.costs
    assert costs is not None
    start = round_start(done.rows)
    pause = replace(outcome(start, [0] * 6, [0] * 6, costs=costs), verify_cost=(6, 1e6))
    Goodput.observe(done.policy, pause)
    done.policy.costs = CostModel(CHEAP, linear(1.0, 0.1))  # refinement has a test of its own
    done.run(300)
    assert float(np.mean(done.verified[-150:])) == pytest.approx(usual, abs=0.5)


@pytest.mark.parametrize("prompt", [0, 30])
def test_where_looking_costs_too_much_it_drafts_without(prompt: int) -> None:
    """A host that takes five verifications to look at a step; without it, speculation pays.

    It is found out, too, where each round feeds a piece of some prompt.
    """
    draft, verify = linear(0.05, 0.001), linear(1.0, 0.002)
    policy = Goodput(online_estimator("confidence"), None, CostModel(draft, verify), 12)
    best = best_fixed(0.8, 64, draft, verify)
    done = World(policy, [0.8] * 64, host=5.0, prompt=prompt).run(200)
    assert done.speculating(100) > 0.9
    assert done.goodput(100) > 0.95 * best


def test_a_jump_that_one_candidate_does_not_repay_is_taken_for_several() -> None:
    """A second token doubles the cost of a round, the next seven are free."""
    verify = CostTable([1, 2, 9, 10, 4096], [1.0, 2.0, 2.0, 9.0, 4096.0])
    done = world([0.9], CHEAP, verify).run(300)
    assert done.speculating(200) > 0.9
    assert done.goodput(200) > 0.9 * best_fixed(0.9, 1, CHEAP, verify)


def test_dropping_hopeless_candidates_makes_speculation_cheaper_not_its_rate_higher() -> None:
    """Half of the candidates are hopeless, and known to be once they are drawn.

    A row's next candidate is accepted with 0.46 then, less than the 0.55 tokens that it costs to
    verify one. Only the others are verified, at half the price, and are nearly all there is to win.
    """
    policy = policy_of(linear(0.01, 0.0), linear(1.0, 0.2), k_max=1)
    rows, random, speculating = memories(6), np.random.default_rng(0), 0
    for _ in range(300):
        start = round_start(rows)
        drawn = [min(k, 1) for k in policy.budget(start)]
        active = np.flatnonzero(drawn)
        submitted, stands = drawn, np.zeros(6, dtype=bool)
        if len(active):
            hopes = random.choice([0.02, 0.9], 6)
            policy.go_on(draft_step(active.tolist(), 1, {Signal.HEAD_AFTER: hopes[active]}))
            submitted = policy.submit(drawn)
            stands = (random.random(6) < hopes) & np.array(submitted, dtype=bool)
            speculating += 1
            assert [row for row in active if submitted[row]] == [
                r for r in active if hopes[r] > 0.5
            ]
        policy.observe(outcome(start, drawn, stands.astype(int).tolist(), submitted))
    assert speculating > 250
    rates = [row.history.accepted / row.history.judged for row in rows]
    assert float(np.mean(rates)) == pytest.approx(0.46, abs=0.1)


def test_every_round_refines_the_costs() -> None:
    policy = policy_of(linear(0.05, 0.001), linear(1.0, 0.01))
    real = CostModel(linear(0.1, 0.004), linear(0.3, 0.01))
    start = round_start(memories(6))
    for _ in range(200):
        policy.budget(start)
        Goodput.observe(policy, outcome(start, [3] * 6, [1] * 6, costs=real))
    assert policy.costs is not None
    assert float(policy.costs.draft(6)) == pytest.approx(float(real.draft(6)), rel=0.05)
    assert float(policy.costs.verify(24)) == pytest.approx(float(real.verify(24)), rel=0.05)


@pytest.mark.parametrize("free_trimming", [True, False], ids=["matching", "rejection"])
def test_easy_rows_draft_more_than_hard_ones(free_trimming: bool) -> None:
    rates = [0.95, 0.3] * 4
    done = world(rates, CHEAP, linear(1.0, 0.05), free_trimming=free_trimming).run(300)
    drafted, verified = (np.array(each[-200:]).mean(0) for each in (done.drafted, done.verified))
    assert drafted[::2].min() > 2 * drafted[1::2].max()
    assert verified[::2].min() > 2 * verified[1::2].max()
    # Each kind is treated nearly as if it were alone; one K for all could not do that.
    mean = sum(best_fixed(rate, 8, CHEAP, linear(1.0, 0.05)) for rate in rates) / 8
    assert done.goodput(200) > best_mixed_fixed(rates, CHEAP, linear(1.0, 0.05))
    assert done.goodput(200) > 0.85 * mean


def best_mixed_fixed(rates: Sequence[float], draft: CostTable, verify: CostTable) -> float:
    """As `best_fixed`, one K for rows of different rates."""
    rows = len(rates)
    return max(
        sum(sum(rate**i for i in range(k + 1)) for rate in rates)
        / (k * float(draft(rows)) + float(verify(rows * (k + 1))))
        for k in range(13)
    )


# -------------------------------------------------------------------------------- corners


def test_rows_without_room_get_nothing_and_disturb_nobody() -> None:
    policy = policy_of(FREE, FLAT)
    start = round_start(memories(3), room=0)
    assert policy.budget(start) == [0, 0, 0]
    some = round_start(memories(3))
    mixed = type(some)(
        some.rows, [0, 9, 9], some.decoding, some.contexts, some.draft_pending, 3, True
    )
    assert [k > 0 for k in policy.budget(mixed)] == [False, True, True]


def test_a_round_that_feeds_prompts_teaches_no_costs() -> None:
    policy = policy_of(CHEAP, FLAT)
    start = round_start(memories(2))
    feeding = type(start)(
        start.rows, start.room, [True, False], start.contexts, start.draft_pending, 500, True
    )
    policy.budget(feeding)
    assert policy.costs is not None
    before = policy.costs.points()
    Goodput.observe(policy, outcome(feeding, [0, 0], [0, 0]))
    assert policy.costs.points() == before


def test_costs_are_profiled_once_unless_they_are_known(pair: TinyPair) -> None:
    assert pair.draft is not None
    costs = CostModel(CHEAP, FLAT)
    known = StatedGoodput(Known(), None, costs)
    known.prepare(pair.target, pair.draft, 2)
    assert known.costs is costs
    unknown = StatedGoodput(Known())
    unknown.prepare(pair.target, pair.draft, 2)
    profiled = unknown.costs
    assert profiled is not None
    unknown.prepare(pair.target, pair.draft, 2)
    assert unknown.costs is profiled


def test_reasons_say_what_a_second_is_worth() -> None:
    policy = policy_of(CHEAP, FLAT)
    drafted(policy, [[0.9, 0.5]])
    assert policy.explain(0).predicted == (0.9,)
    assert "probability 0.90" in policy.explain(0).reason
    hopeless = world([0.02] * 6, CHEAP, FLAT).run(1000)
    hopeless.policy.budget(round_start(hopeless.rows))
    assert "no candidate repays" in hopeless.policy.explain(0).reason


def test_decisions_of_64_rows_take_a_bounded_number_of_array_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are made of arrays: 64 rows ask the cost tables no more often than 4 do."""

    def calls(rows: int) -> list[float]:
        done = world([0.8] * rows, CHEAP, FLAT)
        asked = [0]
        original = CostTable.curve

        def counting(self: CostTable, first: int, last: int) -> Array:
            asked[0] += 1
            return original(self, first, last)

        with monkeypatch.context() as patch:
            patch.setattr(CostTable, "curve", counting)
            result = []
            for _ in range(50):
                asked[0] = 0
                done.run(1)
                result.append(asked[0] / (1 + max(done.drafted[-1])))
        return result

    assert max(calls(64)) <= 2 * max(calls(4))
