"""The job's Ray may die. Ray itself ends the driver then, up to a minute later, without a word.

The lifeline sees it first, and has the job end as any other that failed. Where the job's thread
waits for Ray in C++ and hears nothing, the process ends all the same, but with the reason.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray

from pipeline.observe.monitor import Observer, Posted
from pipeline.run.interrupt import Interrupt

_DAEMONS = frozenset({"gcs_server", "raylet"})
"""Processes without which a Ray is none."""

_LOOK_SECONDS = 2.0
"""Between two looks. Less costs the driver; more makes a dead Ray be noticed later."""

_SILENT_SECONDS = 40.0
"""For which a cluster's head may be away, as when it is restarted. Ray's own patience is a minute,
after which it ends this process."""

_END_SECONDS = 5.0
"""For which the job's thread may take to end. Ray gives it some ten."""

_TAIL_LINES = 3
"""Of a dead process's log that are told."""


_NEWS = re.compile(r"\[[^]]* I ")
"""A line of Ray's log about what is not wrong."""


@contextmanager
def last_word() -> Iterator[Callable[[str], None]]:
    """Yields what to call with why Ray is gone: the block must then end soon, or the process does.

    In Ray's own hands it would end with the same code, and in silence.
    """
    timers: list[threading.Timer] = []

    def tell(reason: str) -> None:
        timers.append(threading.Timer(_END_SECONDS, _end_process, [reason]))
        timers[-1].daemon = True
        timers[-1].start()

    try:
        yield tell
    finally:
        for timer in timers:
            timer.cancel()


def _end_process(reason: str) -> None:
    shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # the cursor, which a progress bar hides
    print(f"{shown}\nfailed: {reason}\nRun the same job again to resume it.", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


class Lifeline(Observer):
    """Ends a job whose Ray is gone.

    Args:
        stop: set when it is gone, so that nobody waits for units in flight.
        interrupt: ends what the job's thread does.
        tell: called with why it is gone; see `last_word`.
    """

    def __init__(
        self, stop: threading.Event, interrupt: Interrupt, tell: Callable[[str], None]
    ) -> None:
        self._stop, self._interrupt, self._tell = stop, interrupt, tell
        children = psutil.Process().children()
        self._daemons = {child: child.name() for child in children if child.name() in _DAEMONS}
        self._logs = {child: folder for child in self._daemons if (folder := _logs(child))}
        self._head: str = ray.get_runtime_context().gcs_address
        self._heard = time.monotonic()
        self._told = False

    @property
    def every(self) -> float:
        """Seconds between two looks."""
        return _LOOK_SECONDS

    def look(self, posted: Posted | None) -> None:
        """Interrupt the job's thread if its Ray is gone."""
        if not self._told and (reason := self.lost()):
            self._told = True
            self._tell(reason)
            self._stop.set()
            self._interrupt()

    def lost(self) -> str | None:
        """Why the job cannot go on; None if it can."""
        for daemon, name in self._daemons.items():
            if _dead(daemon):
                return f"the local Ray died: {name} {_end(daemon)}{self._last_words(daemon, name)}"
        if self._daemons:
            return None
        with suppress(OSError):
            host, _, port = self._head.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=_LOOK_SECONDS).close()
            self._heard = time.monotonic()
        silent = time.monotonic() - self._heard
        if silent < _SILENT_SECONDS:
            return None
        return f"the head of the Ray cluster, {self._head}, has not answered for {silent:.0f} s"

    def _last_words(self, daemon: psutil.Process, name: str) -> str:
        """The end of what a process has logged, and where."""
        folder = self._logs.get(daemon, next(iter(self._logs.values()), None))
        if folder is None:
            return ""
        lines: list[str] = []
        for file in sorted(folder.glob(f"{name}.*")):
            with suppress(OSError):
                lines += map(str.strip, file.read_text(errors="replace").splitlines())
        wrong = [line[:300] for line in lines if line and not _NEWS.match(line)]
        said = " … ".join(wrong[-_TAIL_LINES:])
        return f"; its logs are in {folder}" + (f", and end: {said}" if said else "")


def _logs(daemon: psutil.Process) -> Path | None:
    """The folder of a process's logs, which Ray names on its command line."""
    with suppress(psutil.Error):
        for word in daemon.cmdline():
            if word.startswith("--log_dir="):
                return Path(word.removeprefix("--log_dir="))
    return None


def _dead(daemon: psutil.Process) -> bool:
    try:
        return not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _end(daemon: psutil.Process) -> str:
    """How a child of this process ended."""
    try:
        code = daemon.wait(timeout=0)
    except psutil.Error:
        code = None
    if code is None:
        return "is gone"
    if code >= 0:
        return f"ended with code {code}"
    killed = f"was killed by {signal.Signals(-code).name}"
    kernel = ", as the system does when it has no more memory"
    return killed + (kernel if -code == signal.SIGKILL else "")
