"""The driver's side of the ledger: what a run has spent so far, its budget, and how it ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from pipeline.config.job import JobConfig
from pipeline.config.prices import Hardware, Prices, default_prices, price
from pipeline.errors import BudgetReached, JobStopped, UserError
from pipeline.observe.ledger import Account, Run, new_run, read_ledger, reconcile, write_run
from pipeline.observe.progress import Tally
from pipeline.observe.ray_events import Held, held_by_ray
from pipeline.storage.folder import Folder

_POLL_SECONDS = 0.5
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


class Books:
    """What one run of a job spends, on top of what earlier runs have spent.

    Args:
        output: the job's folder.
        job: the job.
        stop: set when the budget is reached; the run then begins no more units.

    Attributes:
        run: the run as the ledger's header has it.
        stop: as given.

    Raises:
        BudgetReached: earlier runs have spent it.
    """

    def __init__(self, output: Folder, job: JobConfig, stop: threading.Event) -> None:
        self.stop = stop
        self._output, self._budget = output, job.budget
        self._prices = job.prices or default_prices()
        self._earlier = read_ledger(output)
        self._before = spent(self._earlier, self._prices)
        self._accounts: dict[str, Account] = {}
        self._ended: JobStopped | UserError | None = None
        self._monitor: Any = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="books", daemon=True)
        self._first_begun = self._in_flight = 0.0
        self.run = Run(
            run=new_run(),
            began=time.time(),
            prices=self._prices.model_dump(mode="json"),
            budget=job.budget.model_dump() if job.budget else None,
        )
        if reached := self._over_budget():
            raise BudgetReached(reached)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Enter the run into the ledger, and at the end of the block how it ended.

        Raises:
            BudgetReached: in place of `JobStopped`, if that was why.
            UserError: the same, if hardware has no price and there is a budget in money.
        """
        for run in self._earlier:
            if run.ended is None and not run.alive:
                self._close(run, "unknown", wait=0)  # its driver was killed
        write_run(self._output, self.run)
        end = "failed"
        try:
            yield
            end = "done"
        except JobStopped:
            end = "budget" if isinstance(self._ended, BudgetReached) else "stopped"
            raise self._ended or JobStopped() from None
        except KeyboardInterrupt:
            end = "stopped"
            raise
        finally:
            # A ledger that cannot be written hides nothing else; the accounts stay as they are.
            with suppress(UserError):
                self._close(self._now(), end, since=self.run.began)

    # ------------------------------------------------------------------ while it runs

    def keep(self, monitor: Any) -> None:
        """Follow what the actors post to the job's `Monitor`, in a thread, until `last_look`."""
        self._monitor = monitor
        self._thread.start()

    def last_look(self) -> None:
        """The actors are gone; take over what they posted last."""
        self._over.set()
        self._thread.join()
        with suppress(ray.exceptions.RayError):
            self._look()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            with suppress(ray.exceptions.RayError):
                self._look()
                if self._ended is None and (ended := self._reason_to_stop()):
                    self._ended = ended
                    self.stop.set()

    def _look(self) -> None:
        """Take over the accounts; what a monitor that was restarted has forgotten is kept."""
        accounts, begun, done = ray.get(self._monitor.books.remote(), timeout=5)
        self._accounts |= {account.worker: account for account in accounts}
        if begun and not self._first_begun:
            self._first_begun = time.monotonic()
        if done.finished:  # before, most of the time went into prompts: no measure of the rest
            pace = (time.monotonic() - self._first_begun) / done.counts.committed
            self._in_flight = _tokens_to_come(begun, done) * pace

    def _reason_to_stop(self) -> JobStopped | UserError | None:
        if self._budget is None:
            return None
        unpriced = spent([self._now()], self._prices).unpriced
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
        run, cap = self._now(), self._budget
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

    def _now(self) -> Run:
        return replace(self.run, accounts=tuple(self._accounts.values()))

    def _close(
        self, run: Run, end: str, since: float | None = None, wait: float | None = None
    ) -> None:
        waiting = {} if wait is None else {"wait": wait}
        held = held_by_ray({account.actor for account in run.accounts}, since, **waiting)
        accounts = [_settled(account, held.get(account.worker)) for account in run.accounts]
        known = {account.worker for account in run.accounts}
        accounts += _silent(run, (h for h in held.values() if h.worker not in known))
        closed = replace(run, accounts=tuple(accounts), reconciled=asdict(reconcile(accounts)))
        # A run whose driver was killed ended when it was last heard of.
        ended = time.time() if since is not None else closed.seen
        write_run(self._output, replace(closed, ended=ended, end=end))


def _tokens_to_come(begun: int, done: Tally) -> float:
    """Tokens that units in flight still need, if their rows are as long as the completed ones.

    Args:
        begun: rows of all units that were begun.
        done: what was done of them: one row at least, and tokens of unfinished ones.
    """
    rows = begun - done.rows - done.errors
    unfinished = done.counts.committed - done.finished
    return max(0.0, rows * done.finished / done.rows - unfinished)


def _settled(account: Account, held: Held | None) -> Account:
    """The account from its beginning to its end by Ray's events, and its time by these alone.

    Since when a process holds resources only Ray knows: it may have been there before.
    """
    if held is None or held.ended is None:
        return account
    if held.began is None:
        return replace(account.until(held.ended), killed=held.killed)
    known = account.since(held.began).until(held.ended)
    return replace(known, held=held.ended - held.began, killed=held.killed)


def _silent(run: Run, processes: Iterable[Held]) -> Iterable[Account]:
    """Accounts of processes that died before they could post any: all their time is lost."""
    likely: dict[str, Hardware] = {account.node: account.hardware for account in run.accounts}
    for held in processes:
        if held.began is None or held.ended is None:
            continue
        seconds = held.ended - held.began
        yield Account(
            run=run.run,
            actor=held.actor,
            worker=held.worker,
            node=held.node,
            hardware=likely.get(held.node) or _bare(held.resources),
            began=held.began,
            seconds={"lost": seconds},
            ended=held.ended,
            tail=seconds,
            held=seconds,
            killed=held.killed,
        )


def _bare(resources: Mapping[str, float]) -> Hardware:
    held = {name: resources[name] for name in ("CPU", "GPU") if resources.get(name)}
    return Hardware(held, {})
