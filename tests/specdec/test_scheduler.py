from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.cache import KEY_BLOCK, LayerLayout, SlotCache, round_to_blocks
from specdec.request import Request, SamplingParams
from specdec.scheduler import LiveRow, Scheduler

LAYOUT = (LayerLayout(1, 1, 1),)


def row(name: int, need: int) -> LiveRow:
    sampling = SamplingParams(max_new_tokens=1)
    return LiveRow(
        Request(str(name), (name,) * (need - 1), sampling), sampling, [name] * (need - 1), need - 1
    )


def scheduler(slots: int, blocks: int) -> Scheduler:
    caches = [SlotCache(LAYOUT, 0, 0, torch.float32, torch.device("cpu")) for _ in range(2)]
    return Scheduler(caches, slots, blocks * KEY_BLOCK)


def feed(scheduler: Scheduler, rows: Sequence[LiveRow]) -> None:
    """Write each row's name over its whole need in both caches, as the engine's forwards do."""
    for cache in scheduler.caches:
        for slot, each in enumerate(rows):
            n, mark = each.need, float(each.request.id)
            cache.write(
                0,
                torch.full((n, 1, 1), mark),
                torch.full((n, 1, 1), mark),
                torch.full((n,), slot),
                torch.arange(n),
            )
            cache.lengths[slot] = n


def test_rows_are_admitted_in_order_as_far_as_slots_go() -> None:
    s = scheduler(slots=2, blocks=8)
    s.queue.extend(row(name, 5) for name in range(4))
    assert [each.request.id for each in s.admit()] == ["0", "1"]
    s.retire(0)
    assert sorted(each.request.id for each in s.admit()) == ["1", "2"]
    assert len(s.queue) == 1


def test_a_long_row_waits_for_memory_and_is_not_overtaken() -> None:
    s = scheduler(slots=4, blocks=4)
    s.queue.extend([row(0, 5), row(1, 4 * KEY_BLOCK), row(2, 5)])
    assert [each.request.id for each in s.admit()] == ["0"]
    s.retire(0)
    assert [each.request.id for each in s.admit()] == ["1"]
    s.retire(0)
    assert [each.request.id for each in s.admit()] == ["2"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    needs=st.lists(st.integers(2, 3 * KEY_BLOCK), min_size=1, max_size=12),
    slots=st.integers(1, 5),
    blocks=st.integers(3, 9),
    order=st.randoms(use_true_random=False),
)
def test_every_row_keeps_its_cache_through_refills_moves_and_resizes(
    needs: list[int], slots: int, blocks: int, order: object
) -> None:
    s = scheduler(slots, blocks)
    s.queue.extend(row(name, need) for name, need in enumerate(needs))
    known: set[str] = set()
    finished = 0
    while s.queue or s.live:
        rows = s.admit()
        assert 0 < len(rows) <= slots and s.live == len(rows)
        for cache in s.caches:
            assert cache.slots * cache.capacity <= s.max_positions
            assert cache.capacity >= max(each.need for each in rows)
            assert cache.capacity == round_to_blocks(cache.capacity)
            for slot, each in enumerate(rows):
                if each.request.id not in known:
                    assert cache.lengths[slot] == 0  # a fresh slot
                    continue
                assert cache.lengths[slot] == each.need
                held = cache.keys[0][slot, 0, : each.need, 0]
                assert (held == float(each.request.id)).all()
            assert not any(cache.lengths[len(rows) :])
        feed(s, rows)
        known |= {each.request.id for each in rows}
        for slot in range(len(rows)):
            if order.random() < 0.5:  # type: ignore[attr-defined]
                s.retire(slot)
                finished += 1
    assert finished == len(needs)
