"""The loop beside a job: who is called when, by a real `Monitor` and without one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

from pipeline.observe.monitor import Monitor, Observer, ObserverLoop, Posted, start_monitor
from pipeline.observe.progress import Tally


class Seen(Observer):
    """Remembers what it was shown."""

    def __init__(self, every: float = 0.02) -> None:
        self.looks: list[Posted | None] = []
        self.last: list[Posted] = []
        self._every = every

    @property
    def every(self) -> float:
        return self._every

    def look(self, posted: Posted | None) -> None:
        self.looks.append(posted)

    def last_look(self, posted: Posted) -> None:
        self.last.append(posted)


class Failing(Seen):
    def look(self, posted: Posted | None) -> None:
        super().look(posted)
        raise ValueError("no terminal")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_each_observer_is_called_in_its_own_time() -> None:
    often, seldom = Seen(0.02), Seen(1000)
    with ObserverLoop(threading.Event()).running(often, seldom):
        until(lambda: len(often.looks) >= 5)
    assert seldom.looks == [None]  # at once, and not again
    assert set(often.looks) == {None}
    looks = len(often.looks)
    time.sleep(0.1)
    assert len(often.looks) == looks


def test_an_observer_that_fails_is_reported_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    failing, other = Failing(), Seen()
    with ObserverLoop(threading.Event()).running(failing, other):
        until(lambda: len(other.looks) >= 5)
    assert len(failing.looks) == 1
    assert [str(each.exc_value) for each in reported] == ["no terminal"]


def test_what_was_posted_is_the_sum_of_what_actors_say() -> None:
    monitor = Monitor(actors=2)
    assert monitor.look() == Posted(None, (), 0, 0, 0, False)
    monitor.begin("u", 4)
    monitor.begin("v", 2)
    monitor.post("a", Tally(rows=3, errors=1))
    monitor.post("a", Tally(rows=4, errors=1))
    monitor.post("b", Tally(rows=2))
    monitor.end("u", 4, 1)
    posted = monitor.look()
    assert posted.tally == Tally(rows=6, errors=1)
    assert (posted.begun, posted.in_flight) == (6, 2)
    monitor.committed(["u"])
    posted = monitor.look(stop=True)
    assert posted.tally is not None
    assert (posted.tally.units, posted.in_flight, posted.stopping) == (1, 1, True)
    assert monitor.begin("w", 4) is None
    assert monitor.look().stopping


@pytest.mark.ray
def test_what_is_posted_is_shown_until_the_end(local_ray: None) -> None:
    stop = threading.Event()
    loop, first, second = ObserverLoop(stop), Seen(), Seen()
    monitor = start_monitor(1)
    try:
        with loop.running(first):
            with loop.following(monitor, second):
                until(lambda: second.looks and second.looks[-1])
                monitor.post.remote("a", Tally(rows=3))
                until(lambda: (it := second.looks[-1]) and it.tally and it.tally.rows == 3)
                assert not loop.stopping
                stop.set()
                until(lambda: (it := second.looks[-1]) and it.stopping)
                assert loop.stopping
                monitor.post.remote("a", Tally(rows=5))
            (last,) = second.last
            assert last.tally is not None
            assert last.tally.rows == 5
            looks = len(second.looks)
            until(lambda: first.looks[-1] is None)  # it looks on, at nothing
            assert len(second.looks) == looks
        assert first.last == []
    finally:
        ray.kill(monitor)


@pytest.mark.ray
def test_a_monitor_that_is_gone_ends_nothing(local_ray: None) -> None:
    monitor, seen = start_monitor(1), Seen()
    loop = ObserverLoop(threading.Event())
    with loop.running(), loop.following(monitor, seen):
        until(lambda: seen.looks and seen.looks[-1])
        ray.kill(monitor)
        until(lambda: seen.looks[-1] is None)
    assert seen.last == []
