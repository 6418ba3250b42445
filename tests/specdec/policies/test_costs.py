from __future__ import annotations

import numpy as np
import pytest

from specdec.policies.costs import CostModel, CostTable


def test_a_table_is_linear_between_its_tokens() -> None:
    table = CostTable([1, 3, 7], [1.0, 2.0, 10.0])
    assert table([1, 2, 3, 4, 5, 6, 7]).tolist() == [1, 1.5, 2, 4, 6, 8, 10]
    assert float(table(5)) == 6


def test_beyond_the_table_costs_grow_as_over_its_upper_half() -> None:
    """A flat curve stays flat: in proportion, twice the tokens would seem to cost twice as much."""
    assert CostTable([1, 2, 16], [65.0, 65.0, 65.0])([32, 320]).tolist() == [65, 65]
    table = CostTable([1, 4, 8], [1.0, 2.0, 6.0])
    np.testing.assert_allclose(table([8, 9, 16, 808]), [6, 7, 14, 806])
    falling = CostTable([1, 4, 8], [1.0, 3.0, 2.0])  # noise
    np.testing.assert_allclose(falling([4, 8, 16]), np.sqrt(6))


def test_noise_makes_no_tokens_cheaper_than_fewer() -> None:
    """By differences between neighbours a policy decides, so it is they that must not be noise."""
    random = np.random.default_rng(0)
    tokens = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
    true = 80 + 2.0 * np.maximum(tokens - 8, 0)
    noisy = true * random.lognormal(0, 0.15, len(true))
    table = CostTable(tokens, noisy)
    for _ in range(50):
        assert (np.diff(table(tokens)) >= -1e-9).all()
        at = int(random.integers(len(tokens)))
        table.observe(int(tokens[at]), true[at] * random.lognormal(0, 0.15))
    wrong = np.abs(np.diff(table(tokens)) - np.diff(true)).mean()
    assert wrong < np.abs(np.diff(noisy) - np.diff(true)).mean() / 2


def test_what_one_size_costs_against_another_is_a_mean_of_many_rounds() -> None:
    """On a machine whose rounds differ by a sixth, and whose speed wanders by a third."""
    random = np.random.default_rng(0)
    table = CostTable([1, 4, 8, 16], [80.0, 90.0, 120.0, 130.0])
    errors = []
    for turn in range(1000):
        speed = 1 + 0.3 * np.sin(turn / 60)
        for tokens, true in ((4, 100.0), (8, 110.0)):
            table.observe(tokens, true * speed * random.lognormal(0, 0.15))
        errors.append(float(np.log(table(8) / table(4) / 1.1)))
    assert np.sqrt(np.square(errors[200:]).mean()) < 0.035


def test_a_size_that_was_met_while_the_machine_was_slow_is_not_taken_for_a_dear_one() -> None:
    """Nothing else was met then: four tokens a round, and later two, on a machine as profiled."""
    random = np.random.default_rng(0)
    table = CostTable([1, 2, 4, 8], [33.0, 34.0, 36.0, 45.0])
    for speed, tokens, true, rounds in ((1.3, 4, 36.0, 15), (1.0, 2, 34.0, 10)):
        for _ in range(rounds):
            table.observe(tokens, true * speed * random.lognormal(0, 0.1))
    assert float(table(4) / table(2)) == pytest.approx(36 / 34, rel=0.1)


def test_no_tokens_cost_nothing() -> None:
    table = CostTable([1, 8], [1.0, 4.0])
    assert float(table(0)) == 0
    assert table(np.array([], dtype=int)).tolist() == []
    assert table(np.array([[0, 1], [8, 8]])).tolist() == [[0, 1], [4, 4]]


def test_a_table_of_one_measurement_is_proportional() -> None:
    table = CostTable([1], [2.0])
    assert table([1, 2, 10]).tolist() == [2, 4, 20]
    table.observe(1, 4.0)
    assert 2 < float(table(1)) < 4


@pytest.mark.parametrize("factor", [0.2, 0.7, 1.5, 8.0])
def test_refinement_finds_a_changed_cost(factor: float) -> None:
    """The whole curve changes, and only some places of it are visited."""
    table, tokens = CostTable([1, 2, 4, 8, 16], [1.0, 1.0, 1.5, 2.0, 4.0]), np.arange(1, 17)
    wanted = factor * table(tokens)
    random = np.random.default_rng(0)
    for _ in range(400):
        n = int(random.integers(4, 13))
        table.observe(n, wanted[n - 1] * random.lognormal(0, 0.05))
    np.testing.assert_allclose(table(tokens[3:12]), wanted[3:12], rtol=0.1)
    # Nobody went there, but what slowed the machine down will be felt there too.
    assert abs(np.log(float(table(16)) / wanted[15])) < abs(np.log(factor))


def test_refinement_finds_a_step_that_profiling_did_not_see() -> None:
    table = CostTable([1, 4, 8, 12, 16], [1.0] * 5)
    random = np.random.default_rng(0)
    for _ in range(2000):
        n = int(random.choice([2, 6, 8, 12, 16]))
        table.observe(n, 1.0 if n <= 8 else 2.0)
    np.testing.assert_allclose(table([2, 6, 8, 12, 16]), [1, 1, 1, 2, 2], rtol=0.1)


@pytest.mark.parametrize("outlier", [1e-9, 1e9])
def test_an_outlier_counts_as_a_factor_of_two(outlier: float) -> None:
    """Whatever a pause of the machine measures; and no table entry moves further than that."""
    wild, double = (CostTable([1, 4, 8], [1.0, 2.0, 3.0]) for _ in range(2))
    before = wild.seconds.copy()
    wild.observe(5, outlier)
    double.observe(5, float(double(5)) * (2 if outlier > 1 else 1 / 2))
    np.testing.assert_allclose(wild.seconds, double.seconds)
    moved = np.abs(np.log(wild.seconds / before))
    assert (moved > 0).all() and (moved < np.log(2)).all()
    assert moved[1] > moved[0]  # its neighbours most of all


def test_a_measurement_beyond_the_table_moves_its_end() -> None:
    table = CostTable([1, 4, 8], [1.0, 2.0, 4.0])
    for _ in range(100):
        table.observe(32, 32.0)
    assert float(table(32)) == pytest.approx(32, rel=0.05)
    assert table.tokens.tolist() == [1, 4, 8, 32]
    table.observe(36, 36.0)  # not so far beyond: it speaks of the end that there is
    assert table.tokens.tolist() == [1, 4, 8, 32]


def test_a_long_prompt_that_is_measured_once_does_not_make_small_steps_dear() -> None:
    table = CostTable([1, 2, 4], [1.0, 1.0, 1.0])
    for _ in range(50):
        table.observe(400, 40.0)
        table.observe(2, 1.0)
    assert float(table(2)) == pytest.approx(1.0, rel=0.3)
    assert float(table(400)) == pytest.approx(40, rel=0.3)


def test_a_measurement_that_agrees_changes_nothing() -> None:
    table = CostTable([1, 4, 8], [1.0, 2.0, 4.0])
    for tokens in (1, 3, 8, 20):
        table.observe(tokens, float(table(tokens)))
    np.testing.assert_allclose(table.seconds[:3], [1, 2, 4])


def test_points_are_plain_numbers() -> None:
    model = CostModel(CostTable([1, 4], [1.0, 2.0]), CostTable([1, 9], [2.0, 5.0]))
    assert model.points() == {"draft": [(1, 1.0), (4, 2.0)], "verify": [(1, 2.0), (9, 5.0)]}


def test_a_draft_that_rests_while_the_machine_becomes_faster_is_not_taken_for_a_dear_one() -> None:
    model = CostModel(CostTable([1, 4], [2.0, 2.4]), CostTable([1, 8], [20.0, 30.0]))
    for _ in range(60):
        model.observe_verify(4, 0.6 * float(CostTable([1, 8], [20.0, 30.0])(4)))
    assert float(model.draft(1) / model.verify(4)) == pytest.approx(2.0 / 24.3, rel=0.02)
    for _ in range(100):  # and what it takes itself counts all the same
        model.observe_draft(1, 2.0)
    assert float(model.draft(1)) == pytest.approx(2.0, rel=0.02)


def test_rows_with_more_in_their_caches_take_longer_by_their_positions() -> None:
    table = CostTable([1, 4, 8], [1.0, 2.0, 4.0], position=0.001, context=200)
    table.at(rows=4, context=200.0)
    assert table([1, 4, 8]).tolist() == [1, 2, 4]
    assert table.at(rows=4, context=700.0)
    # A forward of one token has one row; those of 4 and 8 tokens have all four.
    np.testing.assert_allclose(table([1, 4, 8]), [1.5, 4, 6])
    assert table.at(rows=4, context=710.0) is False  # near enough
    assert table.points() == [(1, 1.0), (4, 2.0), (8, 4.0)]


def test_growing_rows_are_no_slow_machine() -> None:
    """Rows grow from 200 to 3,200 positions: what more tokens cost stays what it is."""

    def true(tokens: int, context: float) -> float:
        return {4: 2.0, 8: 2.4}[tokens] + 4 * 0.0005 * (context - 200)

    known = CostTable([4, 8], [2.0, 2.4], position=0.0005, context=200)
    unknown = CostTable([4, 8], [2.0, 2.4])
    for context in range(200, 3200, 10):
        for table in (known, unknown):
            table.at(4, context)
            table.observe(4, true(4, context))
    assert float(known(8) - known(4)) == pytest.approx(0.4, rel=0.1)
    assert float(unknown(8) - unknown(4)) > 1.0
    assert abs(known.speed) < 0.05
