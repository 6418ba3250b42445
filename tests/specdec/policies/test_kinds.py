"""Which kind of rounds is taken: the fastest, once all that are possible were measured."""

from __future__ import annotations

import pytest

from specdec.policies.kinds import AGAIN, COLD, FIRST, LEAST, Kind, Kinds

CHAINS, BLIND, TREES = Kind(), Kind(looks=False), Kind(branches=True)
ALL = [CHAINS, BLIND, TREES]


def rounds(
    kinds: Kinds, number: int, rows: int, rates: dict[Kind, float], possible: list[Kind] = ALL
) -> list[Kind]:
    """What was chosen in so many rounds, of which each kind brings so many tokens a second."""
    chosen = []
    for _ in range(number):
        kind = kinds.choose(rows, possible)
        kinds.ended(rows, kind, rates[kind] * 0.01, 0.01)
        chosen.append(kind)
    return chosen


@pytest.mark.parametrize("better", ALL)
def test_the_fastest_kind_is_chosen_and_the_others_tried_now_and_then(better: Kind) -> None:
    kinds, rates = Kinds(), dict.fromkeys(ALL, 100.0) | {better: 110.0}
    first = rounds(kinds, len(ALL) * (LEAST + COLD), 16, rates)
    assert first[: len(ALL)] == ALL  # the safe one comes first
    assert kinds.fastest(16, ALL) == better
    later = rounds(kinds, 4 * (AGAIN + 1), 16, rates)
    assert [later.count(kind) for kind in ALL if kind != better] == [2, 2]


def test_a_change_is_noticed() -> None:
    kinds = Kinds()
    rounds(kinds, 500, 4, {CHAINS: 110.0, BLIND: 100.0, TREES: 90.0})
    later = rounds(kinds, 80 * AGAIN, 4, {CHAINS: 80.0, BLIND: 100.0, TREES: 90.0})
    assert later[-AGAIN:].count(BLIND) >= AGAIN - 1


def test_batches_of_other_sizes_are_others() -> None:
    kinds, two = Kinds(), [CHAINS, TREES]
    rounds(kinds, 2 * (FIRST + COLD), 1, {CHAINS: 110.0, TREES: 120.0}, two)
    rounds(kinds, 2 * (LEAST + COLD), 64, {CHAINS: 110.0, TREES: 100.0}, two)
    assert kinds.fastest(1, two) == TREES
    assert kinds.fastest(64, two) == CHAINS


def test_what_is_far_slower_is_given_up_soon() -> None:
    chosen = rounds(Kinds(), 40, 1, {CHAINS: 100.0, TREES: 60.0}, [CHAINS, TREES])
    assert chosen.count(TREES) == 2 * LEAST + COLD
    chosen = rounds(Kinds(), 40, 1, {CHAINS: 100.0, TREES: 95.0}, [CHAINS, TREES])
    assert chosen.count(TREES) == 20


def test_pauses_of_the_machine_do_not_decide() -> None:
    kinds, two = Kinds(), [CHAINS, TREES]
    for turn in range(40):
        kind = kinds.choose(4, two)
        pause = 0.5 if kind == TREES and turn in (0, 1, 6, 7) else 0.0
        kinds.ended(4, kind, 1.2 if kind == TREES else 1.0, 0.01 + pause)
    assert kinds.fastest(4, two) == TREES


def test_where_one_kind_is_possible_nothing_is_tried() -> None:
    kinds = Kinds()
    assert {*rounds(kinds, 200, 4, {CHAINS: 1.0}, [CHAINS])} == {CHAINS}
