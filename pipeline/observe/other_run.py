"""Whether another run is at work on an output. Two are correct, but both pay for the same rows.

A driver at work renews `_specbatch/status.json` every few seconds (`pipeline.observe.status`). The
time in it is its own machine's, whose clock may be minutes off. So a record of another machine that
may be recent is watched: what is renewed is alive, whatever the time in it. On the same machine the
process itself is looked for, so that a job whose driver was killed is resumed without a wait.

It is not a lock. Of two runs that start in the same moment neither sees the other; soon one of them
finds the other's record in place of its own, and stops.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import psutil

from pipeline.errors import UserError
from pipeline.observe.status import RENEWED_SECONDS, JobStatus, read_status
from pipeline.storage.folder import Folder

CLOCKS_SECONDS = 180.0
"""A record that seems older was not renewed lately, even if the clocks are that far apart."""

WATCHED_SECONDS = 2 * RENEWED_SECONDS + 2.0
"""For how long a record is watched: two renewals. Less, and slow storage looks like a dead run."""

_LOOK_SECONDS = 1.0
"""Between two looks at a record that is watched."""

_START_SECONDS = 2.0
"""A process is the one of a record if it was created no later than so long after the record says
that its run began; otherwise its number was given again."""


def refuse_second_run(output: Folder, note: Callable[[str], object]) -> None:
    """Make sure that no other run is at work on an output, as far as its status file tells.

    It takes up to WATCHED_SECONDS if one on another machine was at work a short while ago.

    Args:
        output: the job's folder.
        note: told why that takes a moment.

    Raises:
        UserError: another run is at work; says which, and what to do.
    """
    there = read_status(output)
    if there is None or not there.alive:
        return
    age = time.time() - there.updated
    if there.host == socket.gethostname():
        if _is_another(there) and there.silent_seconds() is None:
            raise _refusal(output, there, age)
    elif age < CLOCKS_SECONDS:
        note(
            f"{_named(there)} was at work on this output; looking for {WATCHED_SECONDS:.0f} s "
            "whether it still is"
        )
        _watch(output, there)


def _watch(output: Folder, there: JobStatus) -> None:
    """Look at a record until it is renewed or should have been.

    Raises:
        UserError: it was renewed.
    """
    until = time.monotonic() + WATCHED_SECONDS
    while time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
        now = read_status(output)
        if now is None or not now.alive:
            return
        if now != there:
            raise _refusal(output, now, _LOOK_SECONDS)


def _is_another(there: JobStatus) -> bool:
    """Whether the process of a record of this machine lives, and is not this one."""
    if there.pid == os.getpid():
        return False
    try:
        process = psutil.Process(there.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.create_time() <= there.started + _START_SECONDS
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _named(there: JobStatus) -> str:
    return f"process {there.pid} on {there.host}"


def _refusal(output: Folder, there: JobStatus, seconds: float) -> UserError:
    return UserError(
        f"output: another run is at work on {output.url}: {_named(there)}, which said so "
        f"{max(0.0, seconds):.0f} s ago. Wait for it, end it with `specbatch stop {output.url}`, "
        "or say --take-over: then it stops, and this run does the rest"
    )
