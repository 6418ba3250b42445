from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.layout import STATUS
from pipeline.observe import other_run
from pipeline.observe.other_run import refuse_second_run
from pipeline.storage.folder import Folder, open_folder

Write = Callable[..., None]


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    return open_folder(str(tmp_path), S3Config())


@pytest.fixture
def write(output: Folder) -> Write:
    """Writes the record of a run, which is at work if nothing else is said."""

    def put(**changes: Any) -> None:
        values = dict.fromkeys(
            ("rows", "errors", "rows_total", "units", "units_total", "output_tokens", "seconds"), 0
        )
        values |= dict.fromkeys(("tokens_per_second", "acceptance_rate", "seconds_left"))
        values |= {"name": "j", "state": "running", "stage": "generating", "message": None}
        values |= {"host": socket.gethostname(), "pid": 1}
        values |= {"started": time.time(), "updated": time.time(), **changes}
        output.put(STATUS, json.dumps(values).encode())

    return put


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Some process of this machine, as long as a test runs."""
    found = subprocess.Popen(["sleep", "60"])
    yield found
    found.kill()
    found.wait()


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_run, "WATCHED_SECONDS", 0.3)
    monkeypatch.setattr(other_run, "_LOOK_SECONDS", 0.02)


def refuse_a_wait(line: str) -> None:
    pytest.fail(f"it waited: {line}")


def test_another_run_on_this_machine_is_named_at_once(
    output: Folder, write: Write, process: subprocess.Popen[bytes]
) -> None:
    write(pid=process.pid, updated=time.time() - 4)
    with pytest.raises(UserError, match="--take-over") as refused:
        refuse_second_run(output, refuse_a_wait)
    named = f"process {process.pid} on {socket.gethostname()}, which said so 4 s ago"
    assert named in str(refused.value)
    write(pid=process.pid, updated=time.time() - 3600)  # it lives, but has left this job
    refuse_second_run(output, refuse_a_wait)


def test_a_job_whose_driver_is_gone_is_resumed_without_a_wait(
    output: Folder, write: Write, process: subprocess.Popen[bytes]
) -> None:
    refuse_second_run(output, refuse_a_wait)  # no run was there yet
    write(pid=process.pid, started=time.time() - 100)  # another process has its number by now
    refuse_second_run(output, refuse_a_wait)
    write(pid=psutil.Process().pid)  # an earlier job of this process
    refuse_second_run(output, refuse_a_wait)
    for state in ("stopped", "failed", "finished"):
        write(pid=process.pid, state=state)
        refuse_second_run(output, refuse_a_wait)
    write(pid=process.pid)
    process.kill()
    deadline = time.monotonic() + 20
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    refuse_second_run(output, refuse_a_wait)
    process.wait()
    refuse_second_run(output, refuse_a_wait)


@pytest.mark.parametrize("off", [-120.0, 0.0, 120.0])
def test_a_run_elsewhere_is_known_by_its_renewals_whatever_its_clock_says(
    output: Folder, write: Write, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    quick(monkeypatch)
    notes: list[str] = []

    def record(beat: int) -> None:
        write(host="elsewhere", pid=7, started=1.0, updated=time.time() + off + beat / 100)

    record(0)
    refuse_second_run(output, notes.append)  # nobody renews it
    assert notes == [
        "process 7 on elsewhere was at work on this output; looking for 0 s whether it still is"
    ]
    over = threading.Event()

    def renew() -> None:
        beat = 0
        while not over.wait(0.05):
            record(beat := beat + 1)

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(UserError, match=r"another run is at work on .*: process 7 on"):
            refuse_second_run(output, notes.append)
    finally:
        over.set()
        renewing.join()


def test_a_run_elsewhere_that_is_long_silent_or_ends_meanwhile_is_no_hindrance(
    output: Folder, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    write(host="elsewhere", updated=time.time() - 200)
    refuse_second_run(output, refuse_a_wait)
    write(host="elsewhere")
    refuse_second_run(output, lambda _: write(host="elsewhere", state="stopped"))
