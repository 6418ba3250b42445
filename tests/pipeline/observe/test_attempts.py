"""The account of units that were begun and did not end."""

from __future__ import annotations

from pipeline.observe.attempts import (
    HOPELESS_ROWS,
    POISON_DEATHS,
    QUARANTINE_DEATHS,
    Attempts,
)


def condemned(poison: set[int], rows: int, size: int) -> tuple[set[int], int]:
    """Play a job of one unit whose `poison` rows kill what works on them.

    Returns:
        The rows that were given up, and how often the engine died.
    """
    account = Attempts()
    for _ in range(200):
        history = account.begin("u")
        if not history.quarantined:
            if poison:
                continue  # dies
            return set(), history.deaths
        given_up = set()
        for group in history.groups(range(rows), size):
            if history.poisonous(group):
                given_up.add(group[0])
                continue
            account.trial("u", group)
            if poison & set(group):
                break  # dies
            account.passed("u")
        else:
            account.end("u")
            return given_up, history.deaths
    raise AssertionError("no end in 200 attempts")


def test_exactly_the_poisonous_rows_are_found() -> None:
    for poison in (set(), {0}, {255}, {3, 4}, {0, 100, 101, 200}):
        found, deaths = condemned(poison, rows=256, size=16)
        assert found == poison
        # The unit as a whole, once per group with poison in it, and each of the rows.
        groups = len({row // 16 for row in poison})
        most = QUARANTINE_DEATHS + groups + POISON_DEATHS * len(poison)
        assert deaths <= (most if poison else 0)


def test_a_unit_that_ended_starts_with_a_clean_record() -> None:
    account = Attempts()
    account.begin("u")
    assert account.begin("u").deaths == 1
    account.end("u")
    assert account.begin("u").deaths == 0


def test_one_death_is_not_the_units_fault() -> None:
    account = Attempts()
    account.begin("u")
    assert not account.begin("u").quarantined
    assert account.begin("u").quarantined


def test_a_row_is_not_given_up_for_one_death() -> None:
    account = Attempts()
    for _ in range(QUARANTINE_DEATHS):
        account.begin("u")
    account.trial("u", (7,))
    history = account.begin("u")
    assert history.killed == {(7,): 1}
    assert not history.poisonous((7,))


def test_an_engine_that_dies_of_every_row_is_hopeless() -> None:
    account = Attempts()
    for row in range(HOPELESS_ROWS):
        for _ in range(POISON_DEATHS):
            assert not account.begin("u").hopeless
            account.trial("u", (row,))
    assert account.begin("u").hopeless


def test_in_flight_is_until_committed() -> None:
    account = Attempts()
    account.begin("a")
    account.begin("b")
    account.end("a")
    assert account.in_flight == 2
    account.committed("a")
    assert account.in_flight == 1
