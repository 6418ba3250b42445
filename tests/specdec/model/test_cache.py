from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.kernels.choose import cpu_kernels
from specdec.model.cache import KEY_BLOCK, LayerLayout, SlotCache, round_to_blocks
from specdec.model.pages import EMPTY, PAGE, OutOfPages

LAYOUT = (LayerLayout(2, 16, 32), LayerLayout(1, 48, 48))
CPU = torch.device("cpu")


def filled(
    slots: int = 3, capacity: int = KEY_BLOCK, lengths: tuple[int, ...] = (5, 0, 3)
) -> SlotCache:
    """A cache where the number at (slot, position) says which slot and position it is."""
    cache = SlotCache(LAYOUT, slots, capacity, torch.float32, CPU)
    for slot, length in enumerate(lengths):
        write(cache, slot, length)
    return cache


def write(cache: SlotCache, slot: int, count: int) -> None:
    """Append marks of their own to what a slot holds."""
    cache.extend([(slot, count)])
    at = cache.lengths[slot] + torch.arange(count)
    mark = (1000.0 * slot + at)[:, None, None]
    for layer, shape in enumerate(LAYOUT):
        key = mark.expand(count, shape.heads, shape.key_dim)
        value = -mark.expand(count, shape.heads, shape.value_dim)
        cache.write(layer, key, value, cache.places(torch.full((count,), slot), at))
    cache.lengths[slot] += count


def contents(cache: SlotCache, slot: int) -> list[float]:
    """What a slot holds, after checking that all layers, heads and numbers agree."""
    cache.extend([])
    layers = [read(cache, layer, slot) for layer in range(len(LAYOUT))]
    seen = layers[0][0][0, :, 0]
    for keys, values in layers:
        assert (keys == seen[None, :, None]).all()
        assert (values == -seen[None, :, None]).all()
    return seen.tolist()


def read(cache: SlotCache, layer: int, slot: int) -> tuple[Tensor, Tensor]:
    """A layer's keys and values [heads, length, dim] of a slot."""
    keys, values = cache.read(layer, slice(slot, slot + 1), cache.lengths[slot])
    return keys[0], values[0]


@pytest.mark.parametrize(("positions", "rounded"), [(0, 0), (1, 128), (128, 128), (129, 256)])
def test_capacities_are_whole_blocks(positions: int, rounded: int) -> None:
    assert round_to_blocks(positions) == rounded
    assert SlotCache(LAYOUT, 1, positions, torch.float32, CPU).capacity == rounded


def test_bytes_per_position_are_what_the_tensors_take() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cache = SlotCache(LAYOUT, 3, 2 * KEY_BLOCK, dtype, CPU)
        taken = sum(t.nbytes for t in (*cache.keys, *cache.values))
        assert cache.bytes_per_position * (cache.slots * cache.capacity + PAGE) == taken


def test_write_puts_each_token_at_its_slot_and_position() -> None:
    cache = filled()
    assert contents(cache, 0) == [0, 1, 2, 3, 4]
    assert contents(cache, 2) == [2000, 2001, 2002]
    assert not cache.keys[0][EMPTY].any() and cache.pages.rows[1] == []


def test_write_converts_to_the_caches_dtype() -> None:
    cache = SlotCache(LAYOUT, 1, 1, torch.bfloat16, CPU)
    value = torch.full((1, 2, 16), 1 / 3)
    cache.extend([(0, 8)])
    places = cache.places(torch.tensor([0]), torch.tensor([7]))
    cache.write(0, value, torch.ones(1, 2, 32), places)
    assert torch.equal(cache.read(0, slice(0, 1), 8)[0][0, :, 7], value[0].bfloat16())


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


@pytest.mark.parametrize(("slots", "capacity"), [(3, 300), (8, 128), (8, 400), (3, 128), (1, 1)])
def test_a_cache_grows_and_keeps_every_row(slots: int, capacity: int) -> None:
    cache = filled()
    cache.grow(slots, capacity)
    assert (cache.slots, cache.capacity) == (max(slots, 3), round_to_blocks(capacity))
    assert cache.lengths == [5, 0, 3] + [0] * (slots - 3)
    assert contents(cache, 0) == [0, 1, 2, 3, 4]
    assert contents(cache, 2) == [2000, 2001, 2002]
    assert cache.keys[1].shape == (1 + cache.slots * cache.capacity // PAGE, 1, PAGE, 48)
    assert torch.isfinite(torch.cat([t.flatten() for t in (*cache.keys, *cache.values)])).all()


def test_a_cache_that_begins_with_nothing_grows() -> None:
    cache = SlotCache(LAYOUT, 0, 0, torch.float32, CPU)
    cache.grow(2, 5, pages=3)
    assert (cache.lengths, cache.capacity, cache.pages.total) == ([0, 0], KEY_BLOCK, 3)


def test_forks_share_full_pages_and_have_the_last_one_to_themselves() -> None:
    n = 2 * PAGE + 3
    cache = filled(capacity=3 * KEY_BLOCK, lengths=(n + 7, 0, 40))
    cache.fork(0, [1, 2], [n, 2 * PAGE])
    assert contents(cache, 1) == list(range(n))
    assert contents(cache, 2) == list(range(2 * PAGE))
    rows = cache.pages.rows
    assert rows[0][:2] == rows[1][:2] == rows[2] and rows[0][2] != rows[1][2]
    write(cache, 1, 5)
    assert contents(cache, 1)[n:] == [1000 + n + i for i in range(5)]
    assert contents(cache, 0) == list(range(n + 7))
    # Who goes back to before a page that others use too gives it up.
    cache.rollback(1, PAGE + 1)
    assert cache.lengths[1] == PAGE
    write(cache, 1, 3)
    assert contents(cache, 1)[PAGE:] == [1000 + PAGE + i for i in range(3)]
    assert contents(cache, 2) == list(range(2 * PAGE))


def test_scrubbing_zeroes_what_a_slot_alone_has_behind_its_tokens() -> None:
    cache = filled(lengths=(PAGE + 9, 0, 0))
    cache.fork(0, [1], [PAGE])
    for tensor in (*cache.keys, *cache.values):
        tensor[cache.pages.rows[0][1], :, 4:] = torch.nan
    cache.scrub(0, PAGE + 4)
    cache.scrub(1, 0)
    cache.rollback(0, PAGE + 4)
    assert contents(cache, 0) == list(range(PAGE + 4))
    keys, values = cache.read(1, slice(0, 2), 2 * PAGE)
    assert not keys[0, :, PAGE + 4 :].any() and not values[0, :, PAGE + 4 :].any()


def test_more_tokens_than_pages_are_refused_before_anything_changes() -> None:
    cache = filled(lengths=(5, 0, 3))
    cache.lengths[1] = 3 * PAGE
    with pytest.raises(OutOfPages):
        cache.extend([(1, PAGE + 1)])
    assert contents(cache, 0) == [0, 1, 2, 3, 4]


def test_kernels_read_a_cache_where_they_are_wanted_and_can() -> None:
    wide, narrow = LayerLayout(1, 16, 32), LayerLayout(1, 16, 24)
    found = SlotCache((wide,), 1, 1, torch.float32, CPU).kernels
    assert found is cpu_kernels(torch.float32, CPU)
    assert SlotCache((wide, narrow), 1, 1, torch.float32, CPU).kernels is None
    assert SlotCache((wide,), 1, 1, torch.float32, CPU, use_kernels=False).kernels is None


def test_a_cache_counts_how_often_its_tensors_were_replaced() -> None:
    cache = filled()
    before = cache.generation
    cache.rollback(0, 2)
    cache.move(2, 0)
    cache.fork(0, [1], [2])
    assert cache.generation == before
    cache.grow(3, KEY_BLOCK + 1)
    cache.grow(4, KEY_BLOCK)
    cache.grow(4, KEY_BLOCK)
    assert cache.generation == before + 2


@pytest.mark.parametrize("use_kernels", [True, False])
def test_keys_lie_by_dimension_for_kernels_that_want_them_so(use_kernels: bool) -> None:
    cache = SlotCache(LAYOUT, 1, 1, torch.float32, CPU, use_kernels=use_kernels)
    cache.grow(2, 300)
    wanted = cache.kernels is not None and cache.kernels.keys_by_dimension
    for keys, values in zip(cache.keys, cache.values, strict=True):
        assert (keys.mT if wanted else keys).is_contiguous() and values.is_contiguous()
