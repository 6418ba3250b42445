"""What looks on while a job runs: it tells how far the job is, and passes on the wish to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pipeline.observe.monitor import Observer, ObserverLoop, Posted
from pipeline.observe.progress import JobProgress, OnProgress, Tally
from pipeline.run.interrupt import Interrupt
from pipeline.run.lifeline import Lifeline


class Progress(Observer):
    """Tells how far the job is.

    Args:
        rows_total: output rows of the job.
        rows_before: those that earlier runs committed.
        tell: told each moment.
    """

    def __init__(self, rows_total: int, rows_before: int, tell: OnProgress) -> None:
        self._tell, self._rows_total, self._rows_before = tell, rows_total, rows_before
        self._began: float | None = None
        self._tally, self._seconds = Tally(), 0.0

    def connecting(self) -> None:
        """A Ray is being started, or asked."""
        self._tell_moment("connecting to Ray")

    def starting(self) -> None:
        """The actors are being started."""
        self._tell_moment("starting actors")

    def look(self, posted: Posted | None) -> None:
        """Tell what was posted, once there is something."""
        if posted is None or posted.tally is None:
            return
        self._began = self._began or time.monotonic()
        self._tally, self._seconds = posted.tally, time.monotonic() - self._began
        self._tell_moment("finishing units in flight" if posted.stopping else "generating")

    def last_look(self, posted: Posted) -> None:
        self.look(posted)

    def all_done(self) -> None:
        """All rows are completed or failed, though the last reports may have been lost."""
        rows = self._rows_total - self._rows_before
        self._tally = replace(self._tally, rows=rows - self._tally.errors)
        self._tell_moment("checking")

    def _tell_moment(self, stage: str) -> None:
        self._tell(
            JobProgress(stage, self._rows_total, self._rows_before, self._tally, self._seconds)
        )


class Stopping(Observer):
    """Ends a job that was asked to stop, once nothing is in flight.

    Args:
        interrupt: ends what the job's thread does.

    Attributes:
        drained: whether it was interrupted for that.
    """

    def __init__(self, interrupt: Interrupt) -> None:
        self.drained = False
        self._interrupt = interrupt

    def look(self, posted: Posted | None) -> None:
        """Interrupt the job's thread if all that could be completed is committed."""
        if posted is None or self.drained:
            return
        if posted.stopping and not posted.in_flight:
            # All that is left to Ray Data is to pass on units that no actor takes any more.
            self.drained = True
            self._interrupt()


class Watch:
    """The observers of one run while its actors work.

    Args:
        loop: calls them.
        stop: set to have it begin no more units.
        tell_lost: called with why the job's Ray is gone.
        progress: tells how far the job is.
        others: called before it.
    """

    def __init__(
        self,
        loop: ObserverLoop,
        stop: threading.Event,
        tell_lost: Callable[[str], None],
        progress: Progress,
        *others: Observer,
    ) -> None:
        interrupt = Interrupt()
        self._loop, self._progress, self._others = loop, progress, others
        self._stopping, self._lifeline = Stopping(interrupt), Lifeline(stop, interrupt, tell_lost)

    @property
    def stopping(self) -> bool:
        """Whether the job was told to begin no more units."""
        return self._loop.stopping

    @property
    def drained(self) -> bool:
        """Whether it was then interrupted, because nothing was in flight any more."""
        return self._stopping.drained

    def lost(self) -> str | None:
        """Why the Ray that the job runs on is gone; None if it is there."""
        return self._lifeline.lost()

    @contextmanager
    def following(self, monitor: Any) -> Iterator[None]:
        """Look at what is posted to the job's `Monitor` until the block ends."""
        self._progress.starting()
        last = (self._progress, self._stopping, self._lifeline)
        with self._loop.following(monitor, *self._others, *last):
            yield

    def all_done(self) -> None:
        """The actors have completed everything."""
        self._progress.all_done()
