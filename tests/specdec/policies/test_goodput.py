from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.measure.calibration import Array
from specdec.policies.base import RoundOutcome, RowMemory, Signal
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.estimators import Estimator, online_estimator
from specdec.policies.goodput import Goodput
from specdec.policies.objective import leading_rows
from specdec.policies.switch import IN_A_ROW, PROBE_SHARE, REST
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

FREE = CostTable([1, 4096], [1e-9, 1e-9])
"""A draft that costs nothing."""


def policy_of(
    draft: CostTable, verify: CostTable, k_max: int = 8, estimator: Estimator | None = None
) -> StatedGoodput:
    return StatedGoodput(estimator or Known(), None, CostModel(draft, verify), k_max)


def drafted(
    policy: StatedGoodput,
    after: Sequence[Sequence[float]],
    *,
    free_trimming: bool = True,
    before: Sequence[Sequence[float]] | None = None,
) -> list[int]:
    """Start a round and judge candidates, the rows that speculate to the same depth.

    Args:
        after: by depth, the probability of each row's candidate once it is drawn.
        before: the same before it is drawn.

    Returns:
        How many candidates each row has.
    """
    rows = len(after[0])
    budget = policy.budget(round_start(memories(rows), free_trimming=free_trimming))
    active = np.flatnonzero(budget)
    for depth, (known, drawn) in enumerate(zip(before or after, after, strict=True), start=1):
        columns = {
            Signal.HEAD_BEFORE: np.array(known)[active],
            Signal.HEAD_AFTER: np.array(drawn)[active],
        }
        policy.go_on(draft_step(active.tolist(), depth, columns))
    return [len(after) * (row in active) for row in range(rows)]


# ------------------------------------------------------------ the set that is verified


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.lists(st.floats(0.02, 0.98), min_size=3, max_size=3), min_size=1, max_size=3),
    rises=st.lists(st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.3, 1.0]), min_size=6, max_size=6),
)
def test_the_verified_set_is_the_best_of_all_prefix_closed_ones(
    steps: list[list[float]], rises: list[float]
) -> None:
    """Against brute force over every number of candidates of every row.

    Tokens 4 to 6 cost no more than 3 do, so that the first round, which values a second as a round
    without candidates does, always speculates with some rows.
    """
    seconds = [1.0] * 6 + list(1 + np.cumsum(rises))
    verify = CostTable(range(1, 13), seconds)
    policy = policy_of(FREE, verify)
    each = drafted(policy, steps)
    survival = np.cumprod(np.array(steps), 0)

    def gain(ks: Sequence[int]) -> float:
        tokens = sum(float(survival[:k, row].sum()) for row, k in enumerate(ks))
        return tokens - 3.0 / 1.0 * float(verify(3 + sum(ks)))

    submitted = policy.submit(each)
    best = max(gain(ks) for ks in product(*(range(n + 1) for n in each)))
    assert any(each)
    assert gain(submitted) == pytest.approx(best)
    assert all(0 <= k <= n for k, n in zip(submitted, each, strict=True))


def test_a_step_that_is_paid_for_is_filled_with_whatever_there_is() -> None:
    """8 tokens cost what 4 do: unlikely candidates ride along, the 9th would cost a jump."""
    policy = policy_of(FREE, staircase(8, rise=1.0))
    each = drafted(policy, [[0.3, 0.2, 0.1, 0.05], [0.5, 0.5, 0.5, 0.5]])
    assert sum(policy.submit(each)) == 4
    policy = policy_of(FREE, staircase(8, rise=1.0))
    assert policy.submit(drafted(policy, [[0.3, 0.2, 0.1, 0.05]])) == [1, 1, 1, 1]


@pytest.mark.parametrize(("rise", "verified"), [(0.25, 8), (0.5, 4)])
def test_a_jump_is_taken_when_what_lies_behind_it_repays_it(rise: float, verified: int) -> None:
    """4 rows at 4 tokens a second: rises of 1 and 2 tokens, against 4 candidates of 0.36 each.

    One candidate behind the jump never repays it: a search that goes uphill step by step stops.
    """
    policy = policy_of(FREE, staircase(8, rise, most=12))
    each = drafted(policy, [[0.6] * 4, [0.6] * 4])
    assert sum(policy.submit(each)) == verified


def test_likelier_candidates_go_first_whatever_their_row() -> None:
    policy = policy_of(FREE, staircase(8, rise=9.0))
    each = drafted(policy, [[0.9, 0.5, 0.4, 0.1], [0.9, 0.5, 0.9, 0.9], [0.9, 0.1, 0.1, 0.1]])
    assert policy.submit(each) == [3, 1, 0, 0]  # 0.9 0.81 0.729 | 0.5 | 0.4 is the fifth


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


@dataclass
class World:
    """A pair whose candidates are accepted with a probability per row, at stated costs.

    Attributes:
        policy: decides; rates: acceptance per row; the draft knows nothing about a candidate.
        drafted, verified, accepted, seconds, committed, draft_seconds: per round (the first three:
            per row as well).
    """

    policy: Goodput
    rates: Sequence[float]
    free_trimming: bool = True
    seed: int = 0
    drafted: list[list[int]] = field(default_factory=list)
    verified: list[list[int]] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows: list[RowMemory] = memories(len(self.rates))
        self.random = np.random.default_rng(self.seed)

    def run(self, rounds: int) -> World:
        for _ in range(rounds):
            self._round()
        return self

    def _round(self) -> None:
        policy, n = self.policy, len(self.rows)
        start = round_start(self.rows, free_trimming=self.free_trimming)
        budget = list(policy.budget(start))
        counts, stands = [0] * n, [0] * n
        active = [row for row in range(n) if budget[row]]
        alive = [True] * n
        depth = 0
        while active:
            depth += 1
            for row in active:
                counts[row] += 1
                alive[row] = alive[row] and self.random.random() < self.rates[row]
                stands[row] += alive[row]
            known = {Signal.LOG_Q: [-0.5] * len(active), Signal.LOG_TOP: [-0.5] * len(active)}
            flags = policy.go_on(draft_step(active, depth, known)).tolist()
            active = [r for r, on in zip(active, flags, strict=True) if on and budget[r] > depth]
        submitted = list(policy.submit(counts) if any(counts) else counts)
        accepted = [min(k, s) for k, s in zip(submitted, stands, strict=True)]
        assert policy.costs is not None
        this = outcome(start, counts, accepted, submitted, policy.costs)
        policy.observe(this)
        self.drafted.append(counts)
        self.verified.append(submitted)
        self.accepted.append(accepted)
        self.seconds.append(this.verify_cost[1] + sum(s for _, s in this.draft_costs))

    def goodput(self, last: int) -> float:
        """Committed tokens per second of the last rounds."""
        tokens = sum(sum(each) + len(self.rates) for each in self.accepted[-last:])
        return tokens / sum(self.seconds[-last:])

    def speculating(self, last: int) -> float:
        """Share of the last rounds with candidates."""
        return float(np.mean([any(each) for each in self.drafted[-last:]]))


def world(
    rates: Sequence[float], draft: CostTable, verify: CostTable, *, free_trimming: bool = True
) -> World:
    policy = policy_of(draft, verify, 12, online_estimator("confidence"))
    return World(policy, rates, free_trimming)


CHEAP, DEAR = linear(0.05, 0.001), linear(1.0, 0.01)
"""A draft that costs a twentieth of the target, and one that costs the same."""
FLAT, STEEP = linear(1.0, 0.01), linear(0.01, 1.0)
"""A target whose tokens ride along, and one that pays for each."""


@pytest.mark.parametrize("free_trimming", [True, False], ids=["matching", "rejection"])
@pytest.mark.parametrize(
    ("rates", "draft", "verify"),
    [([0.02] * 6, CHEAP, FLAT), ([0.7] * 6, DEAR, FLAT), ([0.7] * 6, CHEAP, STEEP)],
    ids=["useless draft", "dear draft", "dear verification"],
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


def best_fixed(
    rate: float, rows: int, draft: CostTable, verify: CostTable, ks: Sequence[int] = range(13)
) -> float:
    """Tokens per second of the best fixed K of some, by the law of large numbers."""
    return max(
        rows
        * sum(rate**i for i in range(k + 1))
        / (k * float(draft(rows)) + float(verify(rows * (k + 1))))
        for k in ks
    )


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


class Deaf(Goodput):
    """`goodput` whose tables leave `hidden` seconds of each draft step out, and never learn."""

    hidden = 0.0

    def observe(self, outcome: RoundOutcome) -> None:
        dear = [(tokens, seconds + self.hidden) for tokens, seconds in outcome.draft_costs]
        super().observe(replace(outcome, draft_costs=dear))
        self._measured = {}


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


def test_a_jump_that_one_candidate_does_not_repay_is_taken_for_several() -> None:
    """A second token doubles the cost of a round, the next seven are free."""
    verify = CostTable([1, 2, 9, 10, 4096], [1.0, 2.0, 2.0, 9.0, 4096.0])
    done = world([0.9], CHEAP, verify).run(300)
    assert done.speculating(200) > 0.9
    assert done.goodput(200) > 0.9 * best_fixed(0.9, 1, CHEAP, verify)


def test_a_decision_against_speculation_stands_while_rows_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, asked = policy_of(DEAR, STEEP), [0]
    policy.switch.allowance = 0.0

    def counting(*arguments: Any) -> tuple[int, float]:
        asked[0] += 1
        return leading_rows(*arguments)

    monkeypatch.setattr("specdec.policies.goodput.leading_rows", counting)
    rows = memories(4)
    for _ in range(2 * (REST + 1)):
        assert policy.budget(round_start(rows)) == [0] * 4
    assert asked == [2]
    policy.budget(round_start(rows))
    policy.budget(round_start([*rows[1:], RowMemory()]))
    assert asked == [4]


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
    start = round_start([*(RowMemory(catch_up=owed) for _ in range(5)), RowMemory()])
    start = replace(start, draft_pending=[1] * 5 + [100])
    assert np.count_nonzero(policy.budget(start)) == speculating


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
                result.append(asked[0] / max(1, max(done.drafted[-1])))
        return result

    assert max(calls(64)) <= 2 * max(calls(4))
