"""What actors post while a job runs, and the driver's one loop that shows it to observers.

Actors, readers and writers post to the `Monitor`, a small Ray actor beside the driver. The driver's
`ObserverLoop` asks it twice a second and passes the answer on: `Progress` tells the user, `Status`
writes a file, `RunLedger` keeps accounts, `Budget` and `Stopping` end the job.

What is done is what is committed; see `pipeline.commit.manifest`. If posts are lost, a figure comes
late, and no row is lost.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.observe.attempts import Attempts, Group, History
from pipeline.observe.ledger import Account
from pipeline.observe.progress import Tally

POLL_SECONDS = 0.5
"""Between two looks of an observer that does not say otherwise. Less costs the driver and the
monitor more of a core; more makes the progress bar jump and a budget be noticed later."""

_ANSWER_SECONDS = 5.0
"""For which the monitor's answer is waited for. Meanwhile no observer looks."""

_STARTS_PER_ACTOR = 4
_LEAST_STARTS = 20


@dataclass(frozen=True)
class Posted:
    """What was posted so far.

    Attributes:
        tally: what the actors did; None before the first report.
        accounts: of the actors' processes, for the ledger.
        begun: rows of all units that were begun.
        failed: rows that failed, of those of them that have ended.
        in_flight: units begun and not yet committed.
        stopping: whether no more units begin.
    """

    tally: Tally | None
    accounts: tuple[Account, ...]
    begun: int
    failed: int
    in_flight: int
    stopping: bool


class Monitor:
    """The actors' notice board: how far they are, what they have begun, whether to stop.

    Every actor posts its own running totals, so a report that is lost or late does no harm.

    Args:
        actors: how many the job has at most.
    """

    def __init__(self, actors: int) -> None:
        self._tallies: dict[str, Tally] = {}  # by process
        self._accounts: dict[str, Account] = {}
        self._begun: dict[str, int] = {}
        self._failed: dict[str, int] = {}
        self._user_error: str | None = None
        self._attempts = Attempts()
        self._units = 0
        self._stopping = False
        self._starts = 0
        self._most_starts = _LEAST_STARTS + _STARTS_PER_ACTOR * actors

    # --------------------------------------------------------- what actors and writers say

    def start(self) -> None:
        """An actor starts to load. Fails the job if they die again and again and finish nothing.

        Raises:
            RuntimeError: the job has failed already, or does now.
        """
        self._starts += 1
        if self._starts > self._most_starts:
            self.fail(
                f"actors were started {self._starts} times without completing a unit: they die "
                "while loading or at once after it; look for lack of memory, or fewer actors.slots"
            )
        if self._user_error:  # loading the models again would only take longer
            raise RuntimeError(self._user_error)

    def fail(self, message: str) -> None:
        """A mistake of the user's that only an actor could see. The first one stands."""
        self._user_error = self._user_error or message

    def post(self, worker: str, tally: Tally) -> None:
        """The totals so far of an actor's process."""
        self._tallies[worker] = tally

    def book(self, account: Account) -> None:
        """What a process has booked so far."""
        self._accounts[account.worker] = account

    def begin(self, unit: str, rows: int = 0) -> History | None:
        """An attempt at a unit of so many rows begins; None: leave it, the job is stopping."""
        if self._stopping:
            return None
        self._begun[unit] = rows
        return self._attempts.begin(unit)

    def trial(self, unit: str, group: Group) -> None:
        """These rows of a quarantined unit are alone in an engine now."""
        self._attempts.trial(unit, group)

    def passed(self, unit: str) -> None:
        """They were completed."""
        self._attempts.passed(unit)

    def end(self, unit: str, rows: int, failed: int) -> None:
        """An attempt has completed its unit, which had so many rows, some of which failed."""
        self._starts = 0
        self._begun[unit], self._failed[unit] = rows, failed
        self._attempts.end(unit)

    def committed(self, units: list[str]) -> None:
        """These units' files are written."""
        self._units += len(units)
        for unit in units:
            self._attempts.committed(unit)

    # ------------------------------------------------------------------ what the driver asks

    def look(self, stop: bool = False) -> Posted:
        """What was posted. With `stop`, no more units begin from now on."""
        self._stopping = self._stopping or stop
        tally = Tally.sum(self._tallies.values()) if self._tallies else None
        if tally is not None:
            tally.units = self._units
        return Posted(
            tally,
            tuple(self._accounts.values()),
            sum(self._begun.values()),
            sum(self._failed.values()),
            self._attempts.in_flight,
            self._stopping,
        )

    def user_error(self) -> str | None:
        """The user's mistake, if an actor saw one."""
        return self._user_error


def start_monitor(actors: int) -> Any:
    """A `Monitor` beside the driver; costs no CPU slot. Returns its actor handle.

    On the driver's node, since it must outlive any other node; if it dies all the same, what it
    knew is forgotten and learnt again.
    """
    # Not at the top: commands that read a job's status should not wait for Ray.
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Monitor)
    return remote.options(scheduling_strategy=here).remote(actors)


# ------------------------------------------------------------------------- the driver's loop


class Observer:
    """One that looks on while a job runs. Each hook does nothing unless it is overridden."""

    @property
    def every(self) -> float:
        """Seconds between two looks."""
        return POLL_SECONDS

    def look(self, posted: Posted | None) -> None:
        """Called again and again, in the loop's thread: it must not wait, as for storage.

        Args:
            posted: None while there are no actors, or while the monitor does not answer.
        """

    def last_look(self, posted: Posted) -> None:
        """Called once when the actors have done their work: for keeping, not for acting."""


class ObserverLoop:
    """The driver's one thread beside a job. It asks what was posted and calls observers in turn.

    An observer that raises is not called again, and its error is reported as that of a thread; the
    job and the other observers go on.

    Args:
        stop: once it is set, the monitor is told to begin no more units.

    Attributes:
        stopping: whether it was told.
    """

    def __init__(self, stop: threading.Event) -> None:
        self.stopping = False
        self._stop = stop
        self._monitor: Any = None
        self._due: dict[Observer, float] = {}
        self._lock = threading.Lock()  # held while observers are called
        self._wake = threading.Event()
        self._over = False

    @contextmanager
    def running(self, *observers: Observer) -> Iterator[None]:
        """Let these observers look, at once and until the block ends."""
        self._due |= dict.fromkeys(observers, 0.0)
        thread = threading.Thread(target=self._run, name="observers", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over = True
            self._wake.set()
            thread.join()

    @contextmanager
    def following(self, monitor: Any, *observers: Observer) -> Iterator[None]:
        """Let these observers look, too, at what is posted to a monitor; last when the block ends.

        Args:
            monitor: actor handle of the job's `Monitor`.
            observers: called in this order.
        """
        with self._lock:
            self._monitor = monitor
            self._due |= {each: time.monotonic() + each.every for each in observers}
        self._wake.set()
        try:
            yield
        finally:
            self._monitor = None  # an answer that is on its way is shown to nobody
            with self._lock:
                for each in observers:
                    self._due.pop(each, None)
            posted = self._ask(monitor, stop=False)
            if posted is not None:
                for each in observers:
                    each.last_look(posted)

    def _run(self) -> None:
        while not self._over:
            with self._lock:
                self._round()
                due = min(self._due.values(), default=time.monotonic() + POLL_SECONDS)
            self._wake.wait(max(0.0, due - time.monotonic()))
            self._wake.clear()

    def _round(self) -> None:
        """Call each observer whose time has come."""
        now, monitor = time.monotonic(), self._monitor
        ready = [each for each, due in self._due.items() if due <= now]
        posted = None
        if monitor is not None and ready:
            self.stopping = self._stop.is_set()  # from now on units may be left out
            posted = self._ask(monitor, self.stopping)
        for each in ready:
            if self._monitor is not monitor:
                return
            self._due[each] = now + each.every
            try:
                each.look(posted)
            except Exception:
                del self._due[each]
                arguments = (*sys.exc_info(), threading.current_thread())
                threading.excepthook(threading.ExceptHookArgs(arguments))

    @staticmethod
    def _ask(monitor: Any, stop: bool) -> Posted | None:
        """What was posted; None if the monitor does not answer."""
        import ray

        try:
            posted: Posted = ray.get(monitor.look.remote(stop), timeout=_ANSWER_SECONDS)
        except ray.exceptions.RayError:
            return None
        return posted
