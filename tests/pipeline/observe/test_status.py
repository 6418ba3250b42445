from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config.job import S3Config
from pipeline.errors import JobStopped, UserError
from pipeline.layout import STATUS, STOP
from pipeline.observe import status
from pipeline.observe.progress import JobProgress, Tally
from pipeline.observe.status import Beacon, JobStatus, read_status, request_stop
from pipeline.storage.folder import Folder
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
    return Folder(str(tmp_path), S3Config())


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


def beacon(output: Folder, stop: threading.Event | None = None) -> Beacon:
    return Beacon(output, "demo", units=20, units_before=6, progress=None, stop=stop)


def state_of(output: Folder) -> str | None:
    found = read_status(output)
    return found and found.state


def test_a_run_tells_how_far_it_is(
    output: Folder, until: Callable[[Callable[[], object]], None]
) -> None:
    seen: list[JobProgress] = []
    it = Beacon(output, "demo", 20, 6, seen.append, None)
    with it.running():
        until(lambda: state_of(output) == "running")
        it.tell(MOMENT)
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
    with pytest.raises(JobStopped), beacon(output).running():
        raise JobStopped
    assert state_of(output) == "stopped"
    with pytest.raises(RuntimeError), beacon(output).running():
        raise RuntimeError("the disk is on fire")
    found = read_status(output)
    assert found is not None
    assert (found.state, found.message) == ("failed", "RuntimeError: the disk is on fire")


def test_a_wish_to_stop_is_heard(
    output: Folder, until: Callable[[Callable[[], object]], None]
) -> None:
    it = beacon(output)
    with it.running():
        until(lambda: state_of(output) == "running")
        assert not it.stop.is_set()
        request_stop(output)
        until(it.stop.is_set)
        until(lambda: state_of(output) == "stopping")


def test_a_wish_meant_for_an_earlier_run_is_not(
    output: Folder, until: Callable[[Callable[[], object]], None]
) -> None:
    request_stop(output)
    it = beacon(output)
    with it.running():
        before = read_status(output)
        until(lambda: (now := read_status(output)) and now != before)
        assert not it.stop.is_set()
        request_stop(output)
        until(it.stop.is_set)


def test_no_run_fails_for_its_status(
    output: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = threading.Event()

    def refuse(self: Folder, name: str, data: bytes) -> None:
        tried.set()
        raise UserError("no space left")

    monkeypatch.setattr(Folder, "put", refuse)
    with beacon(output).running():
        assert tried.wait(30)
    assert not (tmp_path / STATUS).exists()


def test_records_that_are_none(output: Folder) -> None:
    assert read_status(output) is None
    for data in (b"", b"{", b"[]", b'{"state": "running"}'):
        output.put(STATUS, data)
        assert read_status(output) is None
    with beacon(output).running():
        pass
    record = json.loads(output.read(STATUS) or b"")
    output.put(STATUS, json.dumps({**record, "of_a_later_version": 1}).encode())
    assert state_of(output) == "finished"


def test_silence(output: Folder) -> None:
    with beacon(output).running():
        pass
    found = read_status(output)
    assert found is not None
    assert found.silent_seconds(found.updated + 1000) is None  # it has ended
    running = JobStatus(**{**vars(found), "state": "running"})
    assert running.silent_seconds(running.updated + 59) is None
    assert running.silent_seconds(running.updated + 61) == pytest.approx(61)


@pytest.mark.s3
def test_on_s3(s3_env: object, until: Callable[[Callable[[], object]], None]) -> None:
    client = s3_env.client()  # type: ignore[attr-defined]
    client.create_bucket(Bucket="status")
    output = Folder("s3://status/out", S3Config(endpoint=s3_env.endpoint))  # type: ignore[attr-defined]
    it = beacon(output)
    with it.running():
        until(lambda: state_of(output) == "running")
        request_stop(output)
        until(it.stop.is_set)
    assert state_of(output) == "finished"
    assert output.read(STOP) is not None
