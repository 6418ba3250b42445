"""Whether a device that works beside the host waits for decisions."""

from __future__ import annotations

import pytest

from specdec.policies.looking import AGAIN, FIRST, LEAST, Looking


def rounds(looking: Looking, number: int, rows: int, rates: dict[bool, float]) -> list[bool]:
    """What was chosen in so many rounds, of which each kind brings so many tokens a second."""
    chosen = []
    for _ in range(number):
        looks = looking.choose(rows)
        looking.ended(rows, looks, rates[looks] * 0.01, 0.01)
        chosen.append(looks)
    return chosen


@pytest.mark.parametrize("better", [True, False])
def test_the_faster_kind_is_chosen_and_the_other_tried_now_and_then(better: bool) -> None:
    looking = Looking()
    rounds(looking, 2 * LEAST, 16, {better: 110.0, not better: 100.0})
    assert looking.pays(16) is better
    later = rounds(looking, 4 * (AGAIN + 1), 16, {better: 110.0, not better: 100.0})
    assert later.count(not better) == 4


def test_a_change_is_noticed() -> None:
    looking = Looking()
    rounds(looking, 500, 4, {True: 110.0, False: 100.0})
    later = rounds(looking, 40 * AGAIN, 4, {True: 80.0, False: 100.0})
    assert later[-AGAIN:].count(False) >= AGAIN - 1


def test_batches_of_other_sizes_are_others() -> None:
    looking = Looking()
    rounds(looking, 2 * FIRST, 1, {True: 110.0, False: 100.0})
    rounds(looking, 2 * LEAST, 64, {True: 90.0, False: 100.0})
    assert looking.pays(1)
    assert not looking.pays(64)
