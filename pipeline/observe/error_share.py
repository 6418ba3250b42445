"""How many of a job's rows may fail, and the observer that stops a job of which more do."""

from __future__ import annotations

import threading

from pipeline.errors import TooManyErrors
from pipeline.observe.monitor import Observer, Posted
from pipeline.observe.run_ledger import RunLedger

LEAST_ROWS = 1000
"""Rows that a run begins before it can be stopped for its errors. Fewer say little of the rest, and
a job that small is soon over anyway."""


def too_many(failed: int, completed: int, most: float) -> bool:
    """Whether a job that ends with so many rows in errors and completed has failed.

    Args:
        failed, completed: rows.
        most: the job's `max_error_share`.
    """
    return failed > most * (failed + completed) or (failed > 0 and not completed)


class ErrorShare(Observer):
    """Stops a run once more than the allowed share of the rows that it has begun failed.

    Rows in flight count as if they were going to be completed.

    Args:
        most: the job's `max_error_share`.
        ledger: told why the run was stopped.
        stop: set then; the run begins no more units.
    """

    def __init__(self, most: float, ledger: RunLedger, stop: threading.Event) -> None:
        self._most, self._ledger, self._stop = most, ledger, stop

    def look(self, posted: Posted | None) -> None:
        """Stop the run if too many rows failed."""
        if posted is None or self._ledger.stopped_by is not None:
            return
        begun, failed = posted.begun, posted.failed
        if begun >= LEAST_ROWS and failed > self._most * begun:
            self._ledger.stopped_by = TooManyErrors(
                f"{failed:,} of the first {begun:,} rows failed; max_error_share is {self._most:g}"
            )
            self._stop.set()
