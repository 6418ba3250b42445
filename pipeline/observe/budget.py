"""What a job's runs have spent, and the budget that ends a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
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
        BudgetReached: earlier runs have spent it, or stopped at it.
        UserError: it is in money, and earlier runs had hardware without a price.
    """

    def __init__(self, job: JobConfig, ledger: RunLedger, stop: threading.Event) -> None:
        self._budget, self._ledger, self._stop = job.budget, ledger, stop
        self._prices = job.prices or default_prices()
        self._before = spent(ledger.earlier, self._prices)
        self._first_begun = self._in_flight = 0.0
        if mistake := self._without_price(self._before.unpriced):
            raise mistake
        if reached := self._over_budget() or self._stopped_before():
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
        if mistake := self._without_price(spent([self._ledger.now()], self._prices).unpriced):
            return mistake
        reached = self._over_budget(self._in_flight)
        return BudgetReached(reached) if reached else None

    def _without_price(self, hardware: Sequence[str]) -> UserError | None:
        """What to say of a budget in money when hardware has no price."""
        if not hardware or self._budget is None or self._budget.dollars is None:
            return None
        return UserError(
            f"budget.dollars: there is no price for {', '.join(hardware)} in "
            f"{self._prices.described}; give a table that has it with prices or --prices"
        )

    def _stopped_before(self) -> str | None:
        """Why this run would begin nothing, if an earlier one stopped at the budget that it has.

        What that one left of the budget was too little for another unit.
        """
        stopped = [run for run in self._ledger.earlier if run.end == "budget"]
        if self._budget is None or not stopped or stopped[-1].prices != self._ledger.run.prices:
            return None
        now, then = self._budget.model_dump(), stopped[-1].budget or {}
        capped = {key: cap for key, cap in then.items() if cap is not None}
        if any(now[key] is None or now[key] > cap for key, cap in capped.items()):
            return None
        key, cap, used, _ = max(self._accounts(), key=lambda account: account[2] / account[1])
        return f"{self._words(key, cap, used)}, and an earlier run stopped for that"

    def _over_budget(self, in_flight: float = 0.0) -> str | None:
        """Why no more units may begin, if those in flight take so many seconds; None: they may."""
        for key, cap, used, more in self._accounts(in_flight):
            if used + more >= cap:
                return self._words(key, cap, used, more)
        return None

    def _accounts(self, in_flight: float = 0.0) -> Iterator[tuple[str, float, float, float]]:
        """Each key of the budget, its cap, what is spent of it, and what units in flight take."""
        run, cap = self._ledger.now(), self._budget
        if cap is not None and cap.dollars is not None:
            live = [a for a in run.accounts if time.time() - a.seen < _LIVE_SECONDS]
            rate = sum(price(a.hardware, self._prices).per_hour or 0.0 for a in live) / 3600
            used = (self._before.dollars or 0.0) + (spent([run], self._prices).dollars or 0.0)
            yield "dollars", cap.dollars, used, rate * in_flight
        if cap is not None and cap.hours is not None:
            used = self._before.hours + (time.time() - run.began) / 3600
            yield "hours", cap.hours, used, in_flight / 3600

    def _words(self, key: str, cap: float, used: float, more: float = 0.0) -> str:
        form = ".4g" if key == "dollars" else ".3g"
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
