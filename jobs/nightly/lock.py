"""One run at a time for a dataset: a lock that expires, on a local disk or on S3.

The lock is a row of numbered files; the highest number holds it. To take it is to make the next
number, which of several runs only one can (`Folder.put_if_absent`). A holder renews its file as
long as it lives. One that shows no sign of life until its lock expires has lost it, and so has one
whose process is gone, where that can be seen: on the same machine.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import psutil

from jobs.nightly.archive import ROOT
from pipeline.errors import UserError
from pipeline.storage.folder import Folder, check_conditions

_FOLDER = f"{ROOT}/lock"
_RENEWALS = 4
"""Renewals in the time that a lock holds."""


class LockLost(RuntimeError):
    """Another run has taken the lock: this one may publish nothing more."""


@dataclass(frozen=True)
class Holder:
    """What a lock file says.

    Attributes:
        owner: unique to the run.
        host, pid, started: the process.
        since, expires: seconds since the epoch.
        released: whether the run has ended.
    """

    owner: str
    host: str
    pid: int
    started: float
    since: float
    expires: float
    released: bool = False

    @property
    def alive(self) -> bool:
        """Whether the lock may still be held."""
        if self.released or time.time() > self.expires:
            return False
        if self.host != socket.gethostname():
            return True
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True


class Lock:
    """A lock that this run holds.

    Args:
        folder: the dataset's.
        number: of its file.
        holder: what the file says.
    """

    def __init__(self, folder: Folder, number: int, holder: Holder) -> None:
        self._folder, self._number, self._holder = folder, number, holder

    def check(self) -> None:
        """Make sure that nobody else has taken it.

        Raises:
            LockLost: somebody has.
        """
        if max(_numbers(self._folder), default=0) != self._number:
            raise LockLost("another run has taken this dataset's lock; this run was held up")

    def renew(self, seconds: float) -> None:
        """Hold it for so long from now."""
        self._holder = replace(self._holder, expires=time.time() + seconds)
        self._write()

    def release(self) -> None:
        """Let others take it."""
        self._holder = replace(self._holder, released=True)
        self._write()

    def _write(self) -> None:
        self._folder.put(_name(self._number), json.dumps(asdict(self._holder)).encode())


@contextmanager
def locked(folder: Folder, seconds: float) -> Iterator[Lock]:
    """Hold a dataset's lock.

    Args:
        folder: the dataset's.
        seconds: after which a run that shows no sign of life has lost it.

    Raises:
        UserError: another run holds it.
    """
    lock = _take(folder, seconds)
    over = threading.Event()
    thread = threading.Thread(target=_keep, args=(lock, seconds, over), name="lock", daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        over.set()
        thread.join()
        lock.release()


def _keep(lock: Lock, seconds: float, over: threading.Event) -> None:
    while not over.wait(seconds / _RENEWALS):
        try:
            lock.renew(seconds)
        except Exception:  # storage that is away for a while: the next renewal may do
            continue


def _take(folder: Folder, seconds: float) -> Lock:
    numbers = _numbers(folder)
    last = max(numbers, default=0)
    if last and (data := folder.read(_name(last))) is not None:
        there = Holder(**json.loads(data))
        if there.alive:
            raise _held(there)
    if not last:
        check_conditions(folder)
    process, now = psutil.Process(), time.time()
    mine = Holder(
        owner=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=process.create_time(),
        since=now,
        expires=now + seconds,
    )
    if not folder.put_if_absent(_name(last + 1), json.dumps(asdict(mine)).encode()):
        data = folder.read(_name(last + 1))
        raise _held(Holder(**json.loads(data or b"{}")))
    for number in numbers:
        folder.delete(_name(number))
    return Lock(folder, last + 1, mine)


def _held(holder: Holder) -> UserError:
    since, until = (
        datetime.fromtimestamp(t, UTC).isoformat(" ", "seconds")
        for t in (holder.since, holder.expires)
    )
    return UserError(
        f"another run is at work on this dataset: process {holder.pid} on {holder.host}, since "
        f"{since}; wait for it, or until its lock expires at {until} if it is gone"
    )


def _numbers(folder: Folder) -> list[int]:
    names = (name.removesuffix(".json") for name in folder.list(_FOLDER))
    return sorted(int(name) for name in names if name.isdigit())


def _name(number: int) -> str:
    return f"{_FOLDER}/{number:09d}.json"
