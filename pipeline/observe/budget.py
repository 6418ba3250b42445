"""What a job's runs have spent, and the budget that ends a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.config.job import JobConfig
from pipeline.config.prices import Prices, default_prices, price
from pipeline.errors import BudgetReached, JobStopped, UserError
from pipeline.observe.ledger import Run
from pipeline.observe.monitor import Observer, Posted
from pipeline.observe.progress import Tally
from pipeline.observe.run_ledger import RunLedger

_LIVE_SECONDS = 10.0
"""An account that is older than this is of a process that is gone."""


@dataclass(frozen=True)
class Spent:
    """What was spent.

    Attributes:
        dollars: money of the price table's currency; None if a price is missing.
        hours: hours in which the job ran.
        unpriced: hardware without a price.
    """

    dollars: float | None
    hours: float
    unpriced: tuple[str, ...] = ()


def spent(runs: Iterable[Run], prices: Prices) -> Spent:
    """What some runs have spent."""
    dollars, hours, unpriced = 0.0, 0.0, set()
    for run in runs:
        hours += (run.seen - run.began) / 3600
        for account in run.accounts:
            priced = price(account.hardware, prices)
            if priced.per_hour is None:
                unpriced.add(f"{priced.hardware} ({priced.market})")
            else:
                seconds = account.booked if account.held is None else account.held
                dollars += priced.per_hour * seconds / 3600
    return Spent(None if unpriced else dollars, hours, tuple(sorted(unpriced)))


class Budget(Observer):
    """Stops a run once it has spent the job's budget, on top of what earlier runs have spent.

    Units in flight are completed, so what they still take counts as spent.

    Args:
        job: the job; without a budget, nothing is stopped.
        ledger: what this run and earlier ones have spent; it is told why the run was stopped.
        stop: set when the budget is reached; the run then begins no more units.

    Raises:
        BudgetReached: earlier runs have spent it.
    """

    def __init__(self, job: JobConfig, ledger: RunLedger, stop: threading.Event) -> None:
        self._budget, self._ledger, self._stop = job.budget, ledger, stop
        self._prices = job.prices or default_prices()
        self._before = spent(ledger.earlier, self._prices)
        self._first_begun = self._in_flight = 0.0
        if reached := self._over_budget():
            raise BudgetReached(reached)

    def look(self, posted: Posted | None) -> None:
        """Stop the run if its budget is reached."""
        if posted is None or self._budget is None:
            return
        self._estimate(posted.begun, posted.tally or Tally())
        if self._ledger.stopped_by is None and (reason := self._reason_to_stop()):
            self._ledger.stopped_by = reason
            self._stop.set()

    def _estimate(self, begun: int, done: Tally) -> None:
        """Seconds that units in flight still take."""
        if begun and not self._first_begun:
            self._first_begun = time.monotonic()
        if done.finished:  # before, most of the time went into prompts: no measure of the rest
            pace = (time.monotonic() - self._first_begun) / done.counts.committed
            self._in_flight = _tokens_to_come(begun, done) * pace

    def _reason_to_stop(self) -> JobStopped | UserError | None:
        if self._budget is None:
            return None
        unpriced = spent([self._ledger.now()], self._prices).unpriced
        if self._budget.dollars is not None and unpriced:
            return UserError(
                f"budget.dollars: there is no price for {', '.join(unpriced)} in "
                f"{self._prices.described}; give a table that has it with prices or --prices"
            )
        reached = self._over_budget(self._in_flight)
        return BudgetReached(reached) if reached else None

    def _over_budget(self, in_flight: float = 0.0) -> str | None:
        """Why no more units may begin, if those in flight take so many seconds; None: they may."""
        if self._budget is None:
            return None
        run, cap = self._ledger.now(), self._budget
        if cap.dollars is not None:
            live = [a for a in run.accounts if time.time() - a.seen < _LIVE_SECONDS]
            rate = sum(price(a.hardware, self._prices).per_hour or 0.0 for a in live) / 3600
            used = (self._before.dollars or 0.0) + (spent([run], self._prices).dollars or 0.0)
            if used + rate * in_flight >= cap.dollars:
                return self._words("dollars", cap.dollars, used, rate * in_flight, ".4g")
        if cap.hours is not None:
            used = self._before.hours + (time.time() - run.began) / 3600
            if used + in_flight / 3600 >= cap.hours:
                return self._words("hours", cap.hours, used, in_flight / 3600, ".3g")
        return None

    def _words(self, key: str, cap: float, used: float, more: float, form: str) -> str:
        unit = self._prices.currency if key == "dollars" else "hours"
        begun = f", and units in flight take about {more:{form}} more" if more else ""
        return f"budget.{key}: {used:{form}} of {cap:{form}} {unit} are spent{begun}"


def _tokens_to_come(begun: int, done: Tally) -> float:
    """Tokens that units in flight still need, if their rows are as long as the completed ones.

    Args:
        begun: rows of all units that were begun.
        done: what was done of them: one row at least, and tokens of unfinished ones.
    """
    rows = begun - done.rows - done.errors
    unfinished = done.counts.committed - done.finished
    return max(0.0, rows * done.finished / done.rows - unfinished)
