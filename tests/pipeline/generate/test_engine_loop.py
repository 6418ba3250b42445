from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.generate.engine_loop import EngineLoop
from pipeline.observe.progress import Tally
from specdec.engine.engine import Engine
from specdec.loading.pair import ModelPair
from specdec.measure.speedup import SpeedupMeter
from specdec.policies.registry import make_policy
from specdec.request import Request, SamplingParams
from tests.conftest import TinyModels


@pytest.fixture(scope="module")
def pair(tiny_models: TinyModels) -> ModelPair:
    return ModelPair.load(tiny_models.target, tiny_models.draft)


def engine(pair: ModelPair, slots: int = 16) -> Engine:
    return Engine(pair, policy=make_policy("fixed", k=2), verification="coupled", slots=slots)


def requests(unit: str, rows: int, new_tokens: int = 12) -> list[Request]:
    params = [
        SamplingParams(max_new_tokens=new_tokens, seed=i, ignore_eos=True) for i in range(rows)
    ]
    return [Request(f"{unit}:{i}", (0, 10 + i, 20), p) for i, p in enumerate(params)]


def loop(pair: ModelPair, posts: list[Tally] | None = None, **options: Any) -> EngineLoop:
    post = posts.append if posts is not None else lambda _: None
    return EngineLoop(lambda: engine(pair, **options), threads=1, report=post)


def ids(completions: Sequence[Any]) -> list[tuple[str, tuple[int, ...]]]:
    return [(c.id, c.output_ids) for c in completions]


def test_units_in_flight_share_rounds(pair: ModelPair) -> None:
    alone = engine(pair)
    alone.generate(requests("a", 4))
    shared = loop(pair)
    futures = [shared.submit(requests(unit, 4)) for unit in "abcd"]
    for future in futures:
        assert len(future.result(60)) == 4
    usage = shared.take_usage()
    assert usage.peak_live > 4
    # Four units one after another would need four times the forwards of one.
    assert usage.engine["target_forwards"] < 3 * alone.stats.target_forwards


def test_results_come_in_order_and_to_their_unit(pair: ModelPair) -> None:
    expected = {u: ids(engine(pair).generate(requests(u, 5))) for u in "ab"}
    shared = loop(pair, slots=3)
    futures = {unit: shared.submit(requests(unit, 5)) for unit in "ab"}
    assert {unit: ids(future.result(60)) for unit, future in futures.items()} == expected


def test_equal_ids_in_flight_are_kept_apart(pair: ModelPair) -> None:
    shared = loop(pair)
    first, second = (shared.submit(requests("a", 3)) for _ in range(2))
    assert ids(first.result(60)) == ids(second.result(60))


def test_a_unit_without_requests_ends_at_once(pair: ModelPair) -> None:
    assert loop(pair).submit([]).result(1) == []


def test_each_second_and_forward_is_handed_out_once(pair: ModelPair) -> None:
    shared = loop(pair)
    shared.submit(requests("a", 3)).result(60)
    first = shared.take_usage()
    shared.submit(requests("b", 3)).result(60)
    second = shared.take_usage()
    total = first.engine["target_forwards"] + second.engine["target_forwards"]
    assert total == shared._engine.stats.target_forwards
    assert first.engine["target_forwards"] > 0 < second.engine["target_forwards"]
    assert "idle" in first.phase_seconds
    assert shared.take_usage().engine["target_forwards"] == 0


def test_the_rounds_of_units_add_up_to_the_engines(pair: ModelPair) -> None:
    def measured() -> Engine:
        policy = make_policy("goodput", k_max=4)
        return Engine(pair, policy=policy, verification="coupled", slots=4, control_share=0.25)

    shared = EngineLoop(measured, threads=1, report=lambda _: None)
    total, outcomes, stop = SpeedupMeter(), Counter[tuple[int, int]](), threading.Event()

    def ask() -> None:
        # Units end while other units' rounds are booked.
        while not stop.is_set():
            usage = shared.take_usage()
            total.add(usage.speedup)
            outcomes.update(usage.outcomes)

    asking = threading.Thread(target=ask)
    asking.start()
    for future in [shared.submit(requests(unit, 3)) for unit in "abcdef"]:
        future.result(60)
    stop.set()
    asking.join()
    last = shared.take_usage()
    total.add(last.speedup)
    outcomes.update(last.outcomes)
    assert outcomes == shared._engine.stats.outcomes
    booked = shared._engine.stats.speedup
    assert booked.control
    for arm, whole in ((total.speculative, booked.speculative), (total.control, booked.control)):
        assert arm.keys() == whole.keys()
        for key, rounds in arm.items():
            assert (rounds.n, rounds.k) == (whole[key].n, whole[key].k)
            assert rounds.t == pytest.approx(whole[key].t)
    assert total.mixed == pytest.approx(booked.mixed)
    assert {kind for kind, points in last.costs.items() if points} == {"draft", "verify"}
    assert not last.fell_back


def test_progress_counts_rows_and_errors(pair: ModelPair) -> None:
    posts: list[Tally] = []
    shared = loop(pair, posts)
    too_long = Request("x", tuple([5] * 300), SamplingParams())
    (*_, refused) = shared.submit([*requests("a", 3), too_long]).result(60)
    assert refused.finish_reason == "error"
    shared.note_errors(2)
    shared.submit(requests("b", 1)).result(60)
    assert posts[-1].rows == 4
    assert posts[-1].errors == 3
    assert posts[-1].counts.committed >= 4 * 12


def test_a_reading_is_of_all_that_was_done(pair: ModelPair) -> None:
    shared = loop(pair)
    shared.submit(requests("a", 3)).result(60)
    reading, stats = shared.reading(), shared._engine.stats
    assert reading.tally.rows == 3
    assert reading.tally.counts == stats.counts
    assert (reading.rounds, reading.live_rows) == (stats.rounds, stats.live_rows)
    assert reading.rounds < reading.live_rows


def test_a_round_that_raises_fails_its_units_and_not_the_next(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = Engine.step, []

    def broken_once(self: Engine) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a bug in the engine")
        return step(self)

    monkeypatch.setattr(Engine, "step", broken_once)
    posts: list[Tally] = []
    shared = loop(pair, posts)
    first = shared.submit(requests("a", 3))
    with pytest.raises(RuntimeError, match="a bug in the engine"):
        first.result(60)
    assert ids(shared.submit(requests("a", 3)).result(60)) == ids(
        engine(pair).generate(requests("a", 3))
    )
    assert shared.take_usage().engine["target_forwards"] > 0
    # What the engine before it committed is counted, too: a pace is of both.
    assert posts[-1].counts.committed > shared._engine.stats.counts.committed
    assert posts[-1].finished <= posts[-1].counts.committed
