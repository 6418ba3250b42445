"""How far a job is, while it runs: actors report to one small Ray actor, the driver reads it.

This is for eyes only. What is done is what is committed; see `manifest`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray

from specdec.request import Counts


@dataclass
class Tally:
    """What actors have done so far.

    Attributes:
        rows: rows completed.
        errors: rows failed.
        counts: of all rounds, those of unfinished rows included.
    """

    rows: int = 0
    errors: int = 0
    counts: Counts = field(default_factory=Counts)

    @staticmethod
    def sum(tallies: Iterable[Tally]) -> Tally:
        """All of them together."""
        total = Tally()
        for tally in tallies:
            total.rows += tally.rows
            total.errors += tally.errors
            total.counts.add(tally.counts)
        return total


@dataclass(frozen=True)
class JobProgress:
    """A moment of a running job.

    Attributes:
        stage: what is happening, in a few words.
        rows_total: rows of the job.
        rows_before: rows that earlier runs committed.
        tally: what this run's actors did.
        seconds: since the first actor reported; 0 before.
    """

    stage: str
    rows_total: int
    rows_before: int = 0
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0


OnProgress = Callable[[JobProgress], None]
"""What a caller of `run_job` is told, about twice a second."""


class Monitor:
    """The actors' notice board.

    Every actor posts its own running totals, so a report that is lost or late does no harm.
    """

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._user_error: str | None = None

    def post(self, actor: str, tally: Tally) -> None:
        """An actor's totals so far."""
        self._tallies[actor] = tally

    def fail(self, message: str) -> None:
        """A mistake of the user's that only an actor could see. The first one stands."""
        self._user_error = self._user_error or message

    def read(self) -> tuple[Tally | None, str | None]:
        """The sum of all totals (None before the first report), and the user's mistake if any."""
        total = Tally.sum(self._tallies.values()) if self._tallies else None
        return total, self._user_error


def start_monitor() -> Any:
    """A `Monitor` on the cluster; costs no CPU slot. Returns its actor handle."""
    return ray.remote(num_cpus=0)(Monitor).remote()
