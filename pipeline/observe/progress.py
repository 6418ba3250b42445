"""How far a job is, while it runs: actors report to one small Ray actor, the driver reads it.

This is for eyes only. What is done is what is committed; see `manifest`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.observe.attempts import Attempts, Group, History
from pipeline.observe.ledger import Account
from specdec.request import Counts

_STARTS_PER_ACTOR = 4
_LEAST_STARTS = 20


@dataclass
class Tally:
    """What actors have done so far.

    Attributes:
        rows: rows completed.
        errors: rows failed.
        counts: of all rounds, those of unfinished rows included.
        finished: tokens committed to rows that are completed.
        units: units committed; only in the sum that `Monitor.read` returns.
    """

    rows: int = 0
    errors: int = 0
    counts: Counts = field(default_factory=Counts)
    units: int = 0
    finished: int = 0

    @staticmethod
    def sum(tallies: Iterable[Tally]) -> Tally:
        """All of them together."""
        total = Tally()
        for tally in tallies:
            total.rows += tally.rows
            total.errors += tally.errors
            total.counts.add(tally.counts)
            total.finished += tally.finished
        return total


@dataclass(frozen=True)
class JobProgress:
    """A moment of a running job.

    Attributes:
        stage: what is happening, in a few words.
        rows_total: output rows of the job: all samples, if no row has an `n` of its own.
        rows_before: those that earlier runs committed.
        tally: what this run's actors did.
        seconds: since the first actor reported; 0 before.
    """

    stage: str
    rows_total: int
    rows_before: int = 0
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0

    @property
    def rows_done(self) -> int:
        """Completed and failed, of earlier runs too; retries count twice, so it is capped."""
        return min(self.rows_before + self.tally.rows + self.tally.errors, self.rows_total)

    @property
    def tokens_per_second(self) -> float | None:
        """Of this run; None while that says nothing."""
        if self.seconds <= 1 or not self.tally.counts.committed:
            return None
        return self.tally.counts.committed / self.seconds

    @property
    def seconds_left(self) -> float | None:
        """What the rest takes at this run's pace; None while that says nothing."""
        done, left = self.tally.rows + self.tally.errors, self.rows_total - self.rows_done
        return self.seconds * left / done if self.seconds > 5 and done else None


OnProgress = Callable[[JobProgress], None]
"""What a caller of `run_job` is told, about twice a second."""


class Monitor:
    """The actors' notice board: how far they are, what they have begun, whether to stop.

    Every actor posts its own running totals, so a report that is lost or late does no harm.

    Args:
        actors: how many the job has at most.
    """

    def __init__(self, actors: int) -> None:
        self._tallies: dict[str, Tally] = {}
        self._accounts: dict[str, Account] = {}
        self._begun: dict[str, int] = {}
        self._user_error: str | None = None
        self._attempts = Attempts()
        self._units = 0
        self._stopping = False
        self._starts = 0
        self._most_starts = _LEAST_STARTS + _STARTS_PER_ACTOR * actors

    def post(self, actor: str, tally: Tally) -> None:
        """An actor's totals so far."""
        self._tallies[actor] = tally

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

    def book(self, account: Account) -> None:
        """What a process has booked so far."""
        self._accounts[account.worker] = account

    def books(self) -> tuple[list[Account], int, Tally]:
        """All accounts, the rows of all units that were begun, and what was done of them."""
        done = Tally.sum(self._tallies.values())
        return list(self._accounts.values()), sum(self._begun.values()), done

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

    def end(self, unit: str) -> None:
        """An attempt has completed its unit."""
        self._starts = 0
        self._attempts.end(unit)

    def committed(self, units: list[str]) -> None:
        """These units' files are written."""
        self._units += len(units)
        for unit in units:
            self._attempts.committed(unit)

    def stop(self) -> int:
        """Begin no more units. Returns how many are in flight."""
        self._stopping = True
        return self._attempts.in_flight

    def fail(self, message: str) -> None:
        """A mistake of the user's that only an actor could see. The first one stands."""
        self._user_error = self._user_error or message

    def read(self) -> tuple[Tally | None, str | None]:
        """The sum of all totals (None before the first report), and the user's mistake if any."""
        if not self._tallies:
            return None, self._user_error
        total = Tally.sum(self._tallies.values())
        total.units = self._units
        return total, self._user_error


def start_monitor(actors: int) -> Any:
    """A `Monitor` beside the driver; costs no CPU slot. Returns its actor handle.

    On the driver's node, since it must outlive any other node; if it dies all the same, what it
    knew is forgotten and learnt again.
    """
    # Not at the top: the command line knows what progress is, and should not wait for Ray.
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Monitor)
    return remote.options(scheduling_strategy=here).remote(actors)
