"""How far a job is, while it runs. For eyes only: what is done is what is committed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from specdec.request import Counts


@dataclass
class Tally:
    """What actors have done so far.

    Attributes:
        rows: rows completed.
        errors: rows failed.
        counts: of all rounds, those of unfinished rows included.
        finished: tokens committed to rows that are completed.
        units: units committed; only in the sum that `Monitor.look` returns.
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
