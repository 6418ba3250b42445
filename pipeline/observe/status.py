"""How far a job is, for everybody to read, and the wish that it stop: two files in its output.

_specbatch/status.json      the running driver's account of itself, renewed every few seconds
_specbatch/stop             written anew: the driver begins no more units, commits those in flight
                            and ends

A driver that finds another's account in place of its own was taken over (`run --take-over`), and
ends in the same way.

They are for eyes and for stopping only. What is done is what is committed; see
`pipeline.commit.manifest`. A job never fails for them: a record that cannot be written is written
later, or not.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

from pipeline.errors import JobStopped, TooManyErrors, UserError
from pipeline.layout import STATUS, STOP
from pipeline.observe.monitor import Observer, Posted
from pipeline.observe.progress import JobProgress, OnProgress
from pipeline.storage.folder import Folder

RENEWED_SECONDS = 5.0
"""Between two records, and between two looks for the wish to stop. Less costs requests on S3; more
makes a job stop later."""

SILENT_SECONDS = 60.0
"""After this long without news, a job that says it is running probably is not."""

_MESSAGE_CHARS = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class JobStatus:
    """A moment of a job, as its driver saw it. What is not known is null.

    Attributes:
        name: the job's.
        state: `running`, `stopping` (asked to), `stopped`, `failed` or `finished`.
        stage: what is happening, in a few words.
        rows, errors: completed and failed, of earlier runs too (there, failed ones are in `rows`).
        rows_total: of the input.
        units: committed, of earlier runs too.
        units_total: of the job.
        output_tokens: made by this run, those of unfinished rows included.
        seconds: of this run, since its first actor reported.
        tokens_per_second: of this run.
        acceptance_rate: of this run.
        seconds_left: as long as the rest takes at this run's pace.
        started, updated: seconds since the epoch.
        host, pid: where the driver runs.
        message: why it failed, or was stopped if nobody asked for it.
    """

    name: str
    state: str
    stage: str
    rows: int
    errors: int
    rows_total: int
    units: int
    units_total: int
    output_tokens: int
    seconds: float
    tokens_per_second: float | None
    acceptance_rate: float | None
    seconds_left: float | None
    started: float
    updated: float
    host: str
    pid: int
    message: str | None = None

    @property
    def run(self) -> tuple[str, int, float]:
        """What tells one run from another."""
        return self.host, self.pid, self.started

    @property
    def alive(self) -> bool:
        """Whether a driver was at work when the record was written."""
        return self.state in {"running", "stopping"}

    def silent_seconds(self, now: float | None = None) -> float | None:
        """Since when a driver that should be at work has not been heard of; None if it was."""
        silence = (time.time() if now is None else now) - self.updated
        return silence if self.alive and silence > SILENT_SECONDS else None


def read_status(output: Folder) -> JobStatus | None:
    """The record of the latest run, or None if there is none that this version can read.

    Raises:
        UserError: the storage refuses.
    """
    data = output.read(STATUS)
    try:
        record = json.loads(data or b"")
        return JobStatus(**{f.name: record[f.name] for f in fields(JobStatus)})
    except (ValueError, TypeError, KeyError):
        return None


def request_stop(output: Folder) -> None:
    """Ask the driver that works on this output to stop cleanly. It looks every few seconds.

    Raises:
        UserError: the storage refuses.
    """
    wish = {"requested": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    output.put(STOP, json.dumps(wish).encode())


class StatusFile(Observer):
    """Keeps a run's status file, and looks for the wish to stop.

    Args:
        output: the job's folder.
        name: the job's.
        units: how many there are.
        units_before: how many earlier runs committed.
        progress: told what `tell` is told.
        stop: set when the run is asked to stop by `_specbatch/stop`, or was taken over.
    """

    def __init__(
        self,
        output: Folder,
        name: str,
        units: int,
        units_before: int,
        progress: OnProgress | None,
        stop: threading.Event,
    ) -> None:
        self._output, self._name, self._stop = output, name, stop
        self._units, self._units_before = units, units_before
        self._pass_on = progress or (lambda _: None)
        self._progress = JobProgress("starting", 0)
        self._started = time.time()
        self._reachable = True
        self._old_wish: bytes | None = None
        self._before: JobStatus | None = None
        self._taken_over: JobStatus | None = None
        self._renewal: threading.Thread | None = None

    @property
    def every(self) -> float:
        return RENEWED_SECONDS

    def tell(self, progress: JobProgress) -> None:
        """A moment of the run; in place of the caller's `progress`."""
        self._progress = progress
        self._pass_on(progress)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Say at the end of the block how it ended.

        Raises:
            JobStopped: with words, in place of one without, if another run has taken over.
        """
        # Those that are there already were meant for an earlier run, or are an earlier run's.
        self._old_wish = self._quietly(lambda: self._output.read(STOP))
        self._before = self._quietly(lambda: read_status(self._output))
        state, message = "failed", None
        try:
            yield
            state = "finished"
        except (JobStopped, KeyboardInterrupt) as stop:
            state, message = "stopped", str(stop) or None
            if (by := self._taken_over) is not None:
                words = f"process {by.pid} on {by.host} has taken this job over and does the rest"
                raise JobStopped(words) from None
            raise
        except TooManyErrors as error:
            message = str(error)[:_MESSAGE_CHARS]
            raise
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"[:_MESSAGE_CHARS]
            raise
        finally:
            if self._renewal is not None:
                self._renewal.join(timeout=2 * RENEWED_SECONDS)
            # Storage out of reach is tried for minutes, which is too long for a job that is over.
            if self._reachable and not self._renewing:
                self._quietly(lambda: self._write(state, message))
                if state == "finished":
                    self._quietly(self._output.clear_staging)

    def look(self, posted: Posted | None) -> None:
        """Renew the record and look for the wish, in a thread, since storage may take minutes."""
        if not self._renewing:
            self._renewal = threading.Thread(target=self._renew, name="status", daemon=True)
            self._renewal.start()

    @property
    def _renewing(self) -> bool:
        return self._renewal is not None and self._renewal.is_alive()

    def _renew(self) -> None:
        wish = self._quietly(lambda: self._output.read(STOP))
        if wish not in (None, self._old_wish):
            self._stop.set()
        self._look_for_another()
        self._quietly(lambda: self._write("stopping" if self._stop.is_set() else "running"))

    def _look_for_another(self) -> None:
        """Stop if the record is neither this run's nor the one that was there when it began."""
        there = self._quietly(lambda: read_status(self._output))
        known = {self._me, self._before.run if self._before else None}
        if there is not None and there.run not in known:
            self._taken_over = there
            self._stop.set()

    def _write(self, state: str, message: str | None = None) -> None:
        if self._taken_over is not None:
            return  # it is the other run's account now
        record = self._record(state, message)
        self._output.put(STATUS, json.dumps(asdict(record), indent=1).encode())

    @property
    def _me(self) -> tuple[str, int, float]:
        return socket.gethostname(), os.getpid(), self._started

    def _quietly(self, do: Callable[[], T]) -> T | None:
        try:
            result = do()
        except (UserError, OSError):
            self._reachable = False
            return None
        self._reachable = True
        return result

    def _record(self, state: str, message: str | None) -> JobStatus:
        progress = self._progress
        tally = progress.tally
        host, pid, started = self._me
        return JobStatus(
            name=self._name,
            state=state,
            stage=progress.stage if state in {"running", "stopping"} else state,
            rows=progress.rows_done - tally.errors,
            errors=tally.errors,
            rows_total=progress.rows_total,
            units=min(self._units_before + tally.units, self._units)
            if state != "finished"
            else self._units,
            units_total=self._units,
            output_tokens=tally.counts.committed,
            seconds=progress.seconds,
            tokens_per_second=progress.tokens_per_second,
            acceptance_rate=tally.counts.acceptance_rate,
            seconds_left=progress.seconds_left,
            started=started,
            updated=time.time(),
            host=host,
            pid=pid,
            message=message,
        )
