from __future__ import annotations

import pytest
import torch

from specdec.kernels.choose import cpu_kernels
from specdec.model.cache import KEY_BLOCK, LayerLayout, SlotCache, round_to_blocks

LAYOUT = (LayerLayout(2, 4, 6), LayerLayout(1, 8, 8))
CPU = torch.device("cpu")


def filled(
    slots: int = 3, capacity: int = KEY_BLOCK, lengths: tuple[int, ...] = (5, 0, 3)
) -> SlotCache:
    """A cache where the number at (slot, position) says which slot and position it is."""
    cache = SlotCache(LAYOUT, slots, capacity, torch.float32, CPU)
    for slot, length in enumerate(lengths):
        for layer, shape in enumerate(LAYOUT):
            at = torch.arange(length)
            mark = (1000.0 * slot + at)[:, None, None]
            cache.write(
                layer,
                mark.expand(length, shape.heads, shape.key_dim),
                -mark.expand(length, shape.heads, shape.value_dim),
                torch.full((length,), slot),
                at,
            )
        cache.lengths[slot] = length
    return cache


def contents(cache: SlotCache, slot: int) -> list[float]:
    """What a slot holds, after checking that all layers, heads and numbers agree."""
    n = cache.lengths[slot]
    seen = cache.keys[0][slot, 0, :n, 0]
    for keys, values in zip(cache.keys, cache.values, strict=True):
        assert (keys[slot, :, :n] == seen[None, :, None]).all()
        assert (values[slot, :, :n] == -seen[None, :, None]).all()
    return seen.tolist()


@pytest.mark.parametrize(("positions", "rounded"), [(0, 0), (1, 128), (128, 128), (129, 256)])
def test_capacities_are_whole_blocks(positions: int, rounded: int) -> None:
    assert round_to_blocks(positions) == rounded
    assert SlotCache(LAYOUT, 1, positions, torch.float32, CPU).capacity == rounded


def test_bytes_per_position_are_what_the_tensors_take() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cache = SlotCache(LAYOUT, 3, 2 * KEY_BLOCK, dtype, CPU)
        taken = sum(t.nbytes for t in (*cache.keys, *cache.values))
        assert cache.bytes_per_position * cache.slots * cache.capacity == taken


def test_write_puts_each_token_at_its_slot_and_position() -> None:
    cache = filled()
    assert contents(cache, 0) == [0, 1, 2, 3, 4]
    assert contents(cache, 2) == [2000, 2001, 2002]
    assert not cache.keys[0][1].any()


def test_write_converts_to_the_caches_dtype() -> None:
    cache = SlotCache(LAYOUT, 1, 1, torch.bfloat16, CPU)
    value = torch.full((1, 2, 4), 1 / 3)
    cache.write(0, value, torch.ones(1, 2, 6), torch.tensor([0]), torch.tensor([7]))
    assert torch.equal(cache.keys[0][0, :, 7], value[0].bfloat16())


def test_rollback_forgets_the_end_and_nothing_else() -> None:
    cache = filled()
    cache.rollback(0, 2)
    assert contents(cache, 0) == [0, 1]
    assert contents(cache, 2) == [2000, 2001, 2002]


def test_rollback_does_not_lengthen_a_slot() -> None:
    cache = filled()
    cache.rollback(2, 4)
    assert cache.lengths == [5, 0, 3]


def test_move_carries_a_row_and_empties_its_slot() -> None:
    cache = filled()
    cache.move(2, 0)
    assert cache.lengths == [3, 0, 0]
    assert contents(cache, 0) == [2000, 2001, 2002]


@pytest.mark.parametrize(("slots", "capacity"), [(3, 300), (8, 128), (8, 400), (3, 128)])
def test_resize_keeps_every_row_that_has_a_slot(slots: int, capacity: int) -> None:
    cache = filled()
    cache.resize(slots, capacity)
    assert (cache.slots, cache.capacity) == (slots, round_to_blocks(capacity))
    assert cache.lengths == [5, 0, 3] + [0] * (slots - 3)
    assert contents(cache, 0) == [0, 1, 2, 3, 4]
    assert contents(cache, 2) == [2000, 2001, 2002]
    assert cache.keys[1].shape == (slots, 1, cache.capacity, 8)
    assert torch.isfinite(torch.cat([t.flatten() for t in (*cache.keys, *cache.values)])).all()


def test_resize_to_fewer_slots_and_shorter_rows_keeps_what_fits() -> None:
    cache = filled(slots=4, capacity=3 * KEY_BLOCK, lengths=(5, 2, 0, 0))
    cache.resize(2, KEY_BLOCK)
    assert cache.lengths == [5, 2]
    assert contents(cache, 1) == [1000, 1001]


def test_resize_from_nothing_and_to_nothing() -> None:
    cache = SlotCache(LAYOUT, 0, 0, torch.float32, CPU)
    cache.resize(2, 5)
    assert cache.lengths == [0, 0]
    cache.resize(0, 0)
    assert cache.keys[0].numel() == 0


def test_kernels_read_a_cache_where_they_are_wanted_and_can() -> None:
    wide, narrow = LayerLayout(1, 16, 32), LayerLayout(1, 16, 24)
    found = SlotCache((wide,), 1, 1, torch.float32, CPU).kernels
    assert found is cpu_kernels(torch.float32, CPU)
    assert SlotCache((wide, narrow), 1, 1, torch.float32, CPU).kernels is None
    assert SlotCache((wide,), 1, 1, torch.float32, CPU, use_kernels=False).kernels is None


def test_a_cache_counts_how_often_its_tensors_were_replaced() -> None:
    cache = filled()
    cache.rollback(0, 2)
    cache.move(2, 0)
    cache.fork(0, [1], [2])
    assert cache.generation == 0
    cache.resize(3, KEY_BLOCK)
    cache.resize(3, KEY_BLOCK)
    assert cache.generation == 2
