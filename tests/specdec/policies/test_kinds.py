"""Which kind of rounds is taken: the fastest, once all that are possible were measured."""

from __future__ import annotations

import pytest

from specdec.policies.kinds import AGAIN, COLD, CREDIT, FIRST, LEAST, MOST_LOST, Kind, Kinds

CHAINS, BLIND, TREES = Kind(), Kind(looks=False), Kind(branches=True)
ALL = [CHAINS, BLIND, TREES]


def rounds(
    kinds: Kinds, number: int, rows: int, rates: dict[Kind, float], possible: list[Kind] = ALL
) -> list[Kind]:
    """What was chosen in so many rounds, of which each kind brings so many tokens a second."""
    chosen = []
    for _ in range(number):
        kind = kinds.choose(rows, possible)
        kinds.ended(rows, kind, rates[kind] * 0.01, 0.01, rates[kind] * 0.01)
        chosen.append(kind)
    return chosen


@pytest.mark.parametrize("better", ALL)
def test_the_fastest_kind_is_chosen_and_the_others_tried_now_and_then(better: Kind) -> None:
    kinds, rates = Kinds(), dict.fromkeys(ALL, 100.0) | {better: 110.0}
    first = rounds(kinds, 60, 16, rates)
    assert first[: COLD + LEAST] == [CHAINS] * (COLD + LEAST)  # the safe one comes first
    assert min(map(first.count, ALL)) >= COLD + LEAST
    assert kinds.fastest(16, ALL) == better
    later = rounds(kinds, 4 * (AGAIN + 1), 16, rates)
    assert later.count(better) == len(later) - 4


def test_a_change_is_noticed() -> None:
    kinds = Kinds()
    rounds(kinds, 500, 4, {CHAINS: 110.0, BLIND: 100.0, TREES: 90.0})
    later = rounds(kinds, 80 * AGAIN, 4, {CHAINS: 80.0, BLIND: 100.0, TREES: 90.0})
    assert later[-AGAIN:].count(BLIND) >= AGAIN - 1


def test_batches_of_other_sizes_are_others() -> None:
    kinds, two = Kinds(), [CHAINS, TREES]
    rounds(kinds, 3 * FIRST, 1, {CHAINS: 110.0, TREES: 120.0}, two)
    rounds(kinds, 3 * (COLD + LEAST), 64, {CHAINS: 110.0, TREES: 100.0}, two)
    assert kinds.fastest(1, two) == TREES
    assert kinds.fastest(64, two) == CHAINS


@pytest.mark.parametrize("rate", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("number", [100, 1000, 5000])
def test_what_is_slower_may_lose_little(rate: float, number: int) -> None:
    """Rounds of one length: what trees lack of the fastest rate is what they lose."""
    chosen = rounds(Kinds(), number, 1, {CHAINS: 100.0, TREES: 100 * rate}, [CHAINS, TREES])
    lost = chosen.count(TREES) * (1 - rate)
    assert lost <= MOST_LOST * (number + CREDIT) + 1
    assert chosen.count(TREES) >= 3


def test_pauses_of_the_machine_do_not_decide() -> None:
    kinds, two = Kinds(), [CHAINS, TREES]
    trees = 0
    for _ in range(600):
        kind = kinds.choose(4, two)
        trees += kind == TREES
        pause = 0.1 if kind == TREES and trees % 5 == 2 else 0.0
        tokens = 1.6 if kind == TREES else 1.0
        kinds.ended(4, kind, tokens, 0.01 + pause, tokens)
    assert kinds.fastest(4, two) == TREES


def test_what_is_expected_too_much_of_trees_is_found_out() -> None:
    kinds, two = Kinds(), [CHAINS, TREES]
    for _ in range(200):
        kind = kinds.choose(16, two)
        kinds.ended(16, kind, 60.0 if kind == TREES else 50.0, 0.01, 50.0 - 5 * (kind == TREES))
    assert kinds.fastest(16, two) == CHAINS


def test_where_one_kind_is_possible_nothing_is_tried() -> None:
    kinds = Kinds()
    assert {*rounds(kinds, 200, 4, {CHAINS: 1.0}, [CHAINS])} == {CHAINS}
