from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.engine.scheduler import LiveRow, Scheduler
from specdec.model.cache import KEY_BLOCK, LayerLayout, SlotCache, round_to_blocks
from specdec.model.sharing import LEAST_SHARED, SharedCaches, common_prefix
from specdec.request import Request, SamplingParams

LAYOUT = (LayerLayout(1, 1, 1),)


def row(name: int, need: int, alike: int = 0) -> LiveRow:
    """A row of `need` positions whose first `alike` tokens it shares with others, then its own."""
    sampling = SamplingParams(max_new_tokens=1)
    tokens = [*range(min(alike, need - 1)), *[1000 + name] * (need - 1 - alike)]
    return LiveRow(Request(str(name), tuple(tokens), sampling), sampling, tokens, need - 1)


def scheduler(slots: int, blocks: int, grain: int = 1) -> Scheduler:
    caches = [SlotCache(LAYOUT, 0, 0, torch.float32, torch.device("cpu")) for _ in range(2)]
    return Scheduler(SharedCaches(caches, grain), slots, blocks * KEY_BLOCK)


def feed(scheduler: Scheduler, rows: Sequence[LiveRow], generated: int = 1) -> None:
    """Write what each row lacks of its tokens in both caches, as the engine's forwards do."""
    for each in rows:
        each.tokens += [2000 + int(each.request.id)] * generated
    for cache in scheduler.shared.caches:
        for slot, each in enumerate(rows):
            fed = cache.lengths[slot]
            lacking = torch.tensor(each.tokens[fed:-1], dtype=torch.float32)[:, None, None]
            n = len(lacking)
            at = fed + torch.arange(n)
            cache.write(0, lacking, lacking, torch.full((n,), slot), at)
            cache.lengths[slot] = fed + n


def held(cache: SlotCache, slot: int) -> list[float]:
    """The tokens that a slot holds."""
    return cache.keys[0][slot, 0, : cache.lengths[slot], 0].tolist()


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


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(st.integers(2, 3 * KEY_BLOCK), st.sampled_from([0, 33, 100, 250])),
        min_size=1,
        max_size=12,
    ),
    slots=st.integers(1, 5),
    blocks=st.integers(3, 9),
    grain=st.sampled_from([1, 1, 64]),
    order=st.randoms(use_true_random=False),
)
def test_every_slot_holds_its_rows_tokens_through_refills_moves_resizes_and_sharing(
    shapes: list[tuple[int, int]], slots: int, blocks: int, grain: int, order: object
) -> None:
    s = scheduler(slots, blocks, grain)
    s.queue.extend(
        row(name, need, min(alike, need - 1)) for name, (need, alike) in enumerate(shapes)
    )
    known: set[str] = set()
    finished = taken = 0
    while s.queue or s.live:
        rows = s.admit()
        assert 0 < len(rows) <= slots and s.live == len(rows)
        for cache in s.shared.caches:
            assert cache.slots * cache.capacity <= s.max_positions
            assert cache.capacity >= max(each.need for each in rows)
            assert cache.capacity == round_to_blocks(cache.capacity)
            assert max(cache.lengths) <= cache.capacity
            for slot, each in enumerate(rows):
                assert held(cache, slot) == each.tokens[: cache.lengths[slot]]
                if each.request.id in known:
                    assert cache.lengths[slot] == len(each.tokens) - 1
                    continue
                assert cache.lengths[slot] <= max(0, len(each.tokens) - 2)
                if cache is s.shared.caches[0]:
                    taken += cache.lengths[slot]
                    assert cache.lengths[slot] % grain == 0
        assert s.shared.taken_over == taken
        feed(s, rows)
        known |= {each.request.id for each in rows}
        for slot, each in enumerate(rows):
            if order.random() < 0.5 or len(each.tokens) > each.need:  # type: ignore[attr-defined]
                s.retire(slot)
                finished += 1
    assert finished == len(shapes)


def test_a_row_takes_over_the_longest_prefix_that_any_slot_holds() -> None:
    s = scheduler(slots=4, blocks=8)
    s.queue.extend([row(0, 100, alike=40), row(1, 100, alike=80), row(2, 100)])
    feed(s, s.admit())
    s.queue.append(row(3, 100, alike=70))
    s.admit()
    assert [cache.lengths[3] for cache in s.shared.caches] == [70, 70]
    assert s.shared.taken_over == 70


def test_a_retired_row_is_shared_until_its_slot_is_overwritten() -> None:
    s = scheduler(slots=1, blocks=8)
    s.queue.extend([row(0, 100, alike=60), row(1, 90, alike=60), row(2, 90), row(3, 90, alike=60)])
    lengths = []
    for _ in range(4):
        rows = s.admit()
        lengths.append(s.shared.caches[0].lengths[0])
        feed(s, rows)
        s.retire(0)
    assert lengths == [0, 60, 0, 0]


def test_the_last_two_tokens_of_a_prompt_are_never_taken_over() -> None:
    s = scheduler(slots=2, blocks=8)
    s.queue.append(row(0, 51, alike=50))
    feed(s, s.admit())
    s.queue.append(row(1, 51, alike=50))
    s.admit()
    assert s.shared.caches[0].lengths[1] == 48


def test_short_prefixes_are_not_worth_it() -> None:
    s = scheduler(slots=2, blocks=8)
    s.queue.extend([row(0, 90, alike=LEAST_SHARED - 1)])
    feed(s, s.admit())
    s.queue.append(row(1, 90, alike=LEAST_SHARED - 1))
    s.admit()
    assert s.shared.caches[0].lengths[1] == s.shared.taken_over == 0


def test_with_a_grain_the_target_shares_whole_pieces_of_prompts_and_the_draft_everything() -> None:
    s = scheduler(slots=2, blocks=8, grain=64)
    s.queue.append(row(0, 200, alike=190))
    feed(s, s.admit())
    s.queue.append(row(1, 200, alike=190))
    s.admit()
    assert [cache.lengths[1] for cache in s.shared.caches] == [128, 190]


def test_with_a_grain_what_a_row_has_generated_is_not_shared_in_the_target() -> None:
    s = scheduler(slots=2, blocks=8, grain=64)
    s.queue.append(row(0, 200, alike=199))
    s.queue[0].sampling = SamplingParams(max_new_tokens=100)
    (first,) = s.admit()
    feed(s, [first], generated=100)
    following = row(1, 350)
    following.tokens[:297] = first.tokens[:297]
    s.queue.append(following)
    s.admit()
    assert [cache.lengths[1] for cache in s.shared.caches] == [192, 297]


@pytest.mark.parametrize(
    ("a", "b", "n"),
    [
        ([], [1], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 5, 3], 1),
        ([1] * 100, [1] * 100, 100),
        ([1] * 128, [1] * 200, 128),
        ([*range(100), 7], [*range(100), 8, 9], 100),
    ],
)
def test_common_prefix(a: list[int], b: list[int], n: int) -> None:
    assert common_prefix(a, b) == common_prefix(b, a) == n
