"""The driver's side of the ledger: accounts of this run, kept while it runs and settled at its end.

Each actor keeps its own account and posts it (`pipeline.observe.ledger`). What a process did before
its first post and after its last one only Ray knows (`pipeline.observe.ray_events`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace

from pipeline.config.job import JobConfig
from pipeline.config.prices import Hardware, default_prices
from pipeline.errors import BudgetReached, JobStopped, TooManyErrors, UserError
from pipeline.observe.ledger import Account, Run, new_run, read_ledger, reconcile, write_run
from pipeline.observe.monitor import Observer, Posted
from pipeline.observe.ray_events import Lifetime, actor_lifetimes
from pipeline.storage.folder import Folder

_ENDS: dict[type, str] = {BudgetReached: "budget", TooManyErrors: "errors"}
"""What the ledger calls the end of a run that was told to stop, by why it was."""


class RunLedger(Observer):
    """What one run of a job spends.

    Args:
        output: the job's folder.
        job: the job.

    Attributes:
        run: the run as the ledger's header has it.
        earlier: runs of this job before it.
        stopped_by: why the run was told to stop, if the user did not ask for it.
    """

    def __init__(self, output: Folder, job: JobConfig) -> None:
        prices = job.prices or default_prices()
        self.run = Run(
            run=new_run(),
            began=time.time(),
            prices=prices.model_dump(mode="json"),
            budget=job.budget.model_dump() if job.budget else None,
        )
        self.earlier = read_ledger(output)
        self.stopped_by: JobStopped | TooManyErrors | UserError | None = None
        self._output = output
        self._accounts: dict[str, Account] = {}

    def look(self, posted: Posted | None) -> None:
        """Take over the accounts; what a monitor that was restarted has forgotten is kept."""
        if posted is not None:
            self._accounts |= {account.worker: account for account in posted.accounts}

    def last_look(self, posted: Posted) -> None:
        self.look(posted)

    def now(self) -> Run:
        """The run with what it has spent so far."""
        return replace(self.run, accounts=tuple(self._accounts.values()))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Enter the run into the ledger, and at the end of the block how it ended.

        Raises:
            BudgetReached, TooManyErrors: in place of `JobStopped`, if that was why.
            UserError: the same, if hardware has no price and there is a budget in money.
        """
        for run in self.earlier:
            if run.ended is None and not run.alive:
                self._close(run, "unknown", wait=0)  # its driver was killed
        write_run(self._output, self.run)
        end = "failed"
        try:
            yield
            end = "done"
        except JobStopped:
            end = _ENDS.get(type(self.stopped_by), "stopped")
            raise self.stopped_by or JobStopped() from None
        except KeyboardInterrupt:
            end = "stopped"
            raise
        finally:
            # A ledger that cannot be written hides nothing else; the accounts stay as they are.
            with suppress(UserError):
                self._close(self.now(), end, since=self.run.began)

    def _close(
        self, run: Run, end: str, since: float | None = None, wait: float | None = None
    ) -> None:
        waiting = {} if wait is None else {"wait": wait}
        lives = actor_lifetimes({account.actor for account in run.accounts}, since, **waiting)
        accounts = [_settled(account, lives.get(account.worker)) for account in run.accounts]
        known = {account.worker for account in run.accounts}
        accounts += _silent(run, (life for life in lives.values() if life.worker not in known))
        closed = replace(run, accounts=tuple(accounts), reconciled=asdict(reconcile(accounts)))
        # A run whose driver was killed ended when it was last heard of.
        ended = time.time() if since is not None else closed.seen
        write_run(self._output, replace(closed, ended=ended, end=end))


def _settled(account: Account, life: Lifetime | None) -> Account:
    """The account from its beginning to its end by Ray's events, and its time by these alone.

    Since when a process holds resources only Ray knows: it may have been there before.
    """
    if life is None or life.ended is None:
        return account
    if life.began is None:
        return replace(account.until(life.ended), killed=life.killed)
    known = account.since(life.began).until(life.ended)
    return replace(known, held=life.ended - life.began, killed=life.killed)


def _silent(run: Run, lives: Iterable[Lifetime]) -> Iterable[Account]:
    """Accounts of processes that died before they could post any: all their time is lost."""
    likely: dict[str, Hardware] = {account.node: account.hardware for account in run.accounts}
    for life in lives:
        if life.began is None or life.ended is None:
            continue
        seconds = life.ended - life.began
        yield Account(
            run=run.run,
            actor=life.actor,
            worker=life.worker,
            node=life.node,
            hardware=likely.get(life.node) or _bare(life.resources),
            began=life.began,
            seconds={"lost": seconds},
            ended=life.ended,
            tail=seconds,
            held=seconds,
            killed=life.killed,
        )


def _bare(resources: Mapping[str, float]) -> Hardware:
    """Hardware of which only Ray's resources are known."""
    taken = {name: resources[name] for name in ("CPU", "GPU") if resources.get(name)}
    return Hardware(taken, {})
