from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.engine.scheduler import MOST_PREEMPTIONS, LiveRow, Scheduler
from specdec.model.cache import LayerLayout, SlotCache
from specdec.model.pages import PAGE
from specdec.model.sharing import LEAST_SHARED, SharedCaches, common_prefix
from specdec.request import Request, SamplingParams
from tests.specdec.model.test_pages import check_pages

LAYOUT = (LayerLayout(1, 1, 1),)


def row(name: int, need: int, alike: int = 0, output: int = 1) -> LiveRow:
    """A row of `need` positions whose first `alike` tokens it shares with others, then its own."""
    sampling, prompt = SamplingParams(max_new_tokens=output), need - output
    tokens = [*range(min(alike, prompt)), *[1000 + name] * (prompt - alike)]
    return LiveRow(Request(str(name), tuple(tokens), sampling), sampling, tokens, prompt)


def scheduler(slots: int, pages: int, grain: int = 1, ahead: int = 0) -> Scheduler:
    caches = [SlotCache(LAYOUT, 0, 0, torch.float32, torch.device("cpu")) for _ in range(2)]
    return Scheduler(SharedCaches(caches, grain), slots, pages, context=10**6, ahead=ahead)


def feed(scheduler: Scheduler, rows: Sequence[LiveRow], generated: int = 1) -> None:
    """Write what each row lacks of its tokens in both caches, as the engine's forwards do."""
    for each in rows:
        left = each.sampling.max_new_tokens - each.generated
        each.tokens += [2000 + int(each.request.id)] * min(generated, left)
    for cache in scheduler.shared.caches:
        for slot, each in enumerate(rows):
            fed = cache.lengths[slot]
            lacking = torch.tensor(each.tokens[fed:-1], dtype=torch.float32)[:, None, None]
            n = len(lacking)
            at = fed + torch.arange(n)
            cache.extend([(slot, n)])
            cache.write(0, lacking, lacking, cache.places(torch.full((n,), slot), at))
            cache.lengths[slot] = fed + n


def held(cache: SlotCache, slot: int) -> list[float]:
    """The tokens that a slot holds."""
    cache.extend([])
    keys, _ = cache.read(0, slice(slot, slot + 1), cache.lengths[slot])
    return keys[0, 0, :, 0].tolist()


def test_rows_are_admitted_in_order_as_far_as_slots_go() -> None:
    s = scheduler(slots=2, pages=32)
    s.queue.extend(row(name, 5) for name in range(4))
    assert [each.request.id for each in s.admit()] == ["0", "1"]
    s.retire(0)
    assert sorted(each.request.id for each in s.admit()) == ["1", "2"]
    assert len(s.queue) == 1


def test_a_long_row_waits_for_memory_and_is_not_overtaken() -> None:
    s = scheduler(slots=4, pages=4)
    s.queue.extend([row(0, 5), row(1, 4 * PAGE), row(2, 5)])
    assert [each.request.id for each in s.admit()] == ["0"]
    s.retire(0)
    assert [each.request.id for each in s.admit()] == ["1"]
    s.retire(0)
    assert [each.request.id for each in s.admit()] == ["2"]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(st.integers(2, 300), st.sampled_from([0, 33, 100, 250]), st.integers(1, 80)),
        min_size=1,
        max_size=12,
    ),
    slots=st.integers(1, 5),
    pages=st.integers(12, 40),
    grain=st.sampled_from([1, 1, 48, 64]),
    order=st.randoms(use_true_random=False),
)
def test_every_slot_holds_its_rows_tokens_through_refills_moves_preemptions_and_sharing(
    shapes: list[tuple[int, int, int]], slots: int, pages: int, grain: int, order: Random
) -> None:
    s = scheduler(slots, pages, grain, ahead=3)
    s.queue.extend(
        row(name, prompt + output, min(alike, prompt), output)
        for name, (prompt, alike, output) in enumerate(shapes)
    )
    finished = 0
    while s.queue or s.live:
        before = s.rows
        rows = s.admit()
        assert 0 < len(rows) <= slots and s.live == len(rows)
        kept = [each for each in before if each in rows]
        assert min(before or rows, key=lambda each: each.turn) in rows  # the oldest goes on
        for cache in s.shared.caches:
            assert cache.pages.total <= pages
            check_pages(cache.pages)
            for slot, each in enumerate(rows):
                assert held(cache, slot) == each.tokens[: cache.lengths[slot]]
                assert cache.pages.lacking(slot, min(len(each.tokens) + 4, each.need)) == 0
                if each in kept:
                    assert cache.lengths[slot] == len(each.tokens) - 1
                    continue
                assert cache.lengths[slot] <= max(0, len(each.tokens) - 2)
                if cache is s.shared.caches[0]:
                    assert cache.lengths[slot] % grain == 0
        feed(s, rows, generated=order.randint(1, 4))
        for slot, each in enumerate(rows):
            if order.random() < 0.1 or each.generated == each.sampling.max_new_tokens:
                s.retire(slot)
                finished += 1
            assert each.preempted <= MOST_PREEMPTIONS
    assert finished == len(shapes)
    assert s.shared.available == s.shared.pages


def test_rows_are_admitted_by_what_outputs_turn_out_to_be() -> None:
    """Outputs of 10 tokens that may have 320: as many rows as surely fit, then many more."""
    s = scheduler(slots=32, pages=32)
    s.queue.extend(row(name, 20 + 320, output=320) for name in range(100))
    live = []
    while s.queue or s.live:
        rows = s.admit()
        live.append(len(rows))
        feed(s, rows)
        for slot, each in enumerate(rows):
            if each.generated == 10:
                s.retire(slot)
    assert live[0] <= 16
    assert max(live) > 28
    assert s.preempted == 0


def test_the_youngest_row_makes_place_and_waits_first_in_the_queue() -> None:
    s = scheduler(slots=3, pages=6)
    s.queue.extend(row(name, 20 + 100, output=100) for name in range(3))
    s._lengths.add(1)
    s._lengths.add(1)  # so that all three are admitted
    rows = s.admit()
    while len(rows) == 3:
        feed(s, rows, generated=5)
        rows = s.admit()
    assert [each.request.id for each in rows] == ["0", "1"]
    (last,) = s.queue
    assert (last.request.id, last.preempted, s.preempted) == ("2", 1, 1)
    assert last.generated == 45 and len(last.tokens) == 65


def test_a_row_that_was_sent_back_often_is_admitted_with_all_it_may_need() -> None:
    s = scheduler(slots=2, pages=8)
    often = row(0, 20 + 200, output=200)
    often.preempted = MOST_PREEMPTIONS
    s.queue.extend([row(1, 20 + 60, output=60), often])
    (first,) = s.admit()
    assert first.request.id == "1"
    s.retire(0)
    assert s.admit() == [often]
    assert all(cache.pages.lacking(0, often.need) == 0 for cache in s.shared.caches)


def test_samples_of_a_prompt_hold_it_once() -> None:
    s = scheduler(slots=8, pages=60)
    s.queue.extend(row(name, 1002 + 20, alike=1002, output=20) for name in range(8))
    rows: list[LiveRow] = []
    for _ in range(3):  # one is fed, then the others find what it holds
        rows = s.admit()
        for cache in s.shared.caches:
            for slot in range(len(rows)):
                s.shared.take_over(cache, slot)
        feed(s, rows)
    assert len(rows) == 8
    for cache in s.shared.caches:
        used = {page for each in cache.pages.rows for page in each}
        assert len(used) == 31 + 8
        assert cache.pages.available == cache.pages.total - len(used)


def test_a_row_takes_over_the_longest_prefix_that_any_slot_holds() -> None:
    s = scheduler(slots=4, pages=32)
    s.queue.extend([row(0, 100, alike=40), row(1, 100, alike=80), row(2, 100)])
    feed(s, s.admit())
    s.queue.append(row(3, 100, alike=70))
    s.admit()
    assert [cache.lengths[3] for cache in s.shared.caches] == [70, 70]
    assert s.shared.taken_over == 70


def test_full_pages_of_retired_rows_are_found_until_they_are_needed() -> None:
    s = scheduler(slots=1, pages=6)
    alike = [row(name, 100, alike=70) for name in range(3)]
    s.queue.extend([alike[0], row(3, 60), alike[1], row(4, 6 * PAGE), alike[2]])
    lengths = []
    for _ in range(5):
        rows = s.admit()
        lengths.append(s.shared.caches[0].lengths[0])
        feed(s, rows)
        s.retire(0)
    assert lengths == [0, 0, 2 * PAGE, 0, 0]


def test_the_last_two_tokens_of_a_prompt_are_never_taken_over() -> None:
    s = scheduler(slots=2, pages=32)
    s.queue.append(row(0, 51, alike=50))
    feed(s, s.admit())
    s.queue.append(row(1, 51, alike=50))
    s.admit()
    assert s.shared.caches[0].lengths[1] == 48


def test_short_prefixes_are_not_worth_it() -> None:
    s = scheduler(slots=2, pages=32)
    s.queue.extend([row(0, 90, alike=LEAST_SHARED - 1)])
    feed(s, s.admit())
    s.queue.append(row(1, 90, alike=LEAST_SHARED - 1))
    s.admit()
    assert s.shared.caches[0].lengths[1] == s.shared.taken_over == 0


def test_with_a_grain_the_target_shares_whole_pieces_of_prompts_and_the_draft_everything() -> None:
    s = scheduler(slots=2, pages=32, grain=64)
    s.queue.append(row(0, 200, alike=190))
    feed(s, s.admit())
    s.queue.append(row(1, 200, alike=190))
    s.admit()
    assert [cache.lengths[1] for cache in s.shared.caches] == [128, 190]


def test_with_a_grain_what_a_row_has_generated_is_not_shared_in_the_target() -> None:
    s = scheduler(slots=2, pages=32, grain=64)
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
