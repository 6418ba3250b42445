from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.job import S3Config
from pipeline.errors import JobStopped, UserError
from pipeline.layout import STATUS, STOP
from pipeline.observe import status
from pipeline.observe.monitor import Observer, ObserverLoop, Posted
from pipeline.observe.progress import JobProgress, OnProgress, Tally
from pipeline.observe.status import JobStatus, StatusFile, read_status, request_stop
from pipeline.storage.folder import Folder, open_folder
from pipeline.storage.local import LocalFolder
from specdec.request import Counts

MOMENT = JobProgress(
    "generating",
    rows_total=200,
    rows_before=60,
    tally=Tally(rows=30, errors=10, counts=Counts(50, 40, 40, 10, 600), units=3),
    seconds=20,
)


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    return open_folder(str(tmp_path), S3Config())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "RENEWED_SECONDS", 0.02)


@pytest.fixture
def until() -> Iterator[Callable[[Callable[[], object]], None]]:
    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.01)

    yield wait


class Run:
    """A run that does nothing but keep its status."""

    def __init__(self, output: Folder, progress: OnProgress | None = None) -> None:
        self.stop = threading.Event()
        self.status = StatusFile(output, "demo", 20, 6, progress, self.stop)

    def __enter__(self) -> None:
        self._context = ExitStack()
        self._context.enter_context(self.status.kept())
        self._context.enter_context(ObserverLoop(self.stop).running(self.status))

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def state_of(output: Folder) -> str | None:
    found = read_status(output)
    return found and found.state


def test_a_run_tells_how_far_it_is(
    output: Folder, until: Callable[[Callable[[], object]], None]
) -> None:
    seen: list[JobProgress] = []
    it = Run(output, seen.append)
    with it:
        until(lambda: state_of(output) == "running")
        it.status.tell(MOMENT)
        until(lambda: (found := read_status(output)) is not None and found.rows)
        found = read_status(output)
    assert seen == [MOMENT]
    assert isinstance(found, JobStatus)
    assert (found.stage, found.rows, found.errors, found.rows_total) == ("generating", 90, 10, 200)
    assert (found.units, found.units_total) == (9, 20)
    assert (found.tokens_per_second, found.acceptance_rate) == (30, 0.25)
    assert found.seconds_left == 50
    assert found.alive
    last = read_status(output)
    assert last is not None
    assert (last.state, last.units, last.alive) == ("finished", 20, False)


def test_how_it_ended(output: Folder) -> None:
    with pytest.raises(JobStopped), Run(output):
        raise JobStopped
    assert state_of(output) == "stopped"
    with pytest.raises(RuntimeError), Run(output):
        raise RuntimeError("the disk is on fire")
    found = read_status(output)
    assert found is not None
    assert (found.state, found.message) == ("failed", "RuntimeError: the disk is on fire")


def test_a_wish_to_stop_is_heard(
    output: Folder, until: Callable[[Callable[[], object]], None]
) -> None:
    it = Run(output)
    with it:
        until(lambda: state_of(output) == "running")
        assert not it.stop.is_set()
        request_stop(output)
        until(it.stop.is_set)
        until(lambda: state_of(output) == "stopping")


def test_a_wish_meant_for_an_earlier_run_is_not(
    output: Folder, until: Callable[[Callable[[], object]], None]
) -> None:
    request_stop(output)
    it = Run(output)
    with it:
        before = read_status(output)
        until(lambda: (now := read_status(output)) and now != before)
        assert not it.stop.is_set()
        request_stop(output)
        until(it.stop.is_set)


def test_a_run_that_is_taken_over_stops_and_leaves_the_record_to_the_other(
    output: Folder, until: Callable[[Callable[[], object]], None]
) -> None:
    with Run(output):
        pass  # an earlier one, whose record is no reason to stop
    it = Run(output)
    with pytest.raises(JobStopped, match="process 7 on elsewhere has taken this job over"), it:
        until(lambda: state_of(output) == "running")
        mine = read_status(output)
        assert mine is not None
        others = json.dumps(vars(mine) | {"host": "elsewhere", "pid": 7}).encode()

        def heard() -> bool:
            # Again and again, as a run does: this one may write between its look and our record.
            output.put(STATUS, others)
            return it.stop.is_set()

        until(heard)
        raise JobStopped  # as a job does then
    assert output.read(STATUS) == others


def test_of_two_runs_that_begin_together_one_goes_on(
    output: Folder, until: Callable[[Callable[[], object]], None]
) -> None:
    one, other = Run(output), Run(output)
    with suppress(JobStopped), one, suppress(JobStopped), other:
        until(lambda: one.stop.is_set() or other.stop.is_set())
        time.sleep(0.2)  # ten more looks
        assert one.stop.is_set() != other.stop.is_set()


def test_no_run_fails_for_its_status(
    output: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = threading.Event()

    def refuse(self: LocalFolder, name: str, data: bytes) -> None:
        tried.set()
        raise UserError("no space left")

    monkeypatch.setattr(LocalFolder, "put", refuse)
    with Run(output):
        assert tried.wait(30)
    assert not (tmp_path / STATUS).exists()


def test_records_that_are_none(output: Folder) -> None:
    assert read_status(output) is None
    for data in (b"", b"{", b"[]", b'{"state": "running"}'):
        output.put(STATUS, data)
        assert read_status(output) is None
    with Run(output):
        pass
    record = json.loads(output.read(STATUS) or b"")
    output.put(STATUS, json.dumps({**record, "of_a_later_version": 1}).encode())
    assert state_of(output) == "finished"


def test_silence(output: Folder) -> None:
    with Run(output):
        pass
    found = read_status(output)
    assert found is not None
    assert found.silent_seconds(found.updated + 1000) is None  # it has ended
    running = JobStatus(**{**vars(found), "state": "running"})
    assert running.silent_seconds(running.updated + 59) is None
    assert running.silent_seconds(running.updated + 61) == pytest.approx(61)


def test_storage_that_hangs_holds_up_neither_the_loop_nor_the_end(
    output: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked once at a time, and what others look at goes on meanwhile."""
    asked, looks, back = [], [], threading.Event()

    class Other(Observer):
        every = 0.01

        def look(self, posted: Posted | None) -> None:
            looks.append(time.monotonic())

    def hang(self: LocalFolder, name: str, data: bytes) -> None:
        asked.append(name)
        assert back.wait(60)

    monkeypatch.setattr(LocalFolder, "put", hang)
    it = Run(output)
    with it.status.kept(), ObserverLoop(it.stop).running(it.status, Other()):
        deadline = time.monotonic() + 30
        while len(looks) < 20 or not asked:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        began = time.monotonic()
    assert time.monotonic() - began < 30
    assert asked == [STATUS]
    back.set()


@pytest.mark.s3
def test_on_s3(s3_env: object, until: Callable[[Callable[[], object]], None]) -> None:
    client = s3_env.client()  # type: ignore[attr-defined]
    client.create_bucket(Bucket="status")
    output = open_folder("s3://status/out", S3Config(endpoint=s3_env.endpoint))  # type: ignore[attr-defined]
    it = Run(output)
    with it:
        until(lambda: state_of(output) == "running")
        request_stop(output)
        until(it.stop.is_set)
    assert state_of(output) == "finished"
    assert output.read(STOP) is not None
