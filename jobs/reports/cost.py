"""What a job cost: the ledger's seconds at the prices of the resources that they held.

`Cost` is the object under the key `cost` of `specbatch report OUT --json`. Its names are an
interface: add to them, do not rename them. What is not known is null.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.parquet as pq
from pydantic import ValidationError

from pipeline import layout
from pipeline.commit.record import UnitRecord, parts
from pipeline.config.prices import Prices, price
from pipeline.errors import UserError
from pipeline.observe.ledger import WORK, Account, Reconciliation, Run, read_ledger, reconcile
from pipeline.storage.folder import Folder

STATES = (
    "start",
    "load",
    "profile",
    "warmup",
    "prefill",
    "draft",
    "decide",
    "verify",
    "sample",
    "host",
    "control",
    "idle",
    "lost",
)
"""What an actor's seconds were spent on, in the order of reports.

start: process start and imports; load: models; profile: measuring what forwards cost; warmup:
recording forwards of new sizes on a GPU; prefill to host: rounds with speculation; control: target
forwards of rounds without, by which the speedup is measured; idle: no row to work on; lost: work on
units that this actor did not commit, because it was killed, preempted, or another attempt was
faster.
"""


@dataclass(frozen=True)
class ProcessCost:
    """One process that held resources: an actor, or an actor's life between two restarts.

    Attributes:
        run: id of the run, which begins with its time (UTC).
        actor: Ray's actor id.
        node: Ray's node id.
        hardware: the instance type or GPU type that the price is of, "CPU" for cores.
        market: "on_demand" or "spot".
        resources: what it held: {"CPU": 2.0, "GPU": 1.0}.
        began, ended: seconds since the epoch. Ended is when the account ends.
        end: how it ended: "done", "stopped", "killed" (it died while others went on), "running",
            or "unknown" (the driver was killed: the last heartbeat counts as its end).
        seconds_held: ended - began, by Ray's events where it has them.
        seconds_by_state: what it booked; sums to `seconds_held` up to the error of the clocks.
        price_per_hour: of all it held.
        cost: `seconds_held` at that price.
    """

    run: str
    actor: str
    node: str
    hardware: str
    market: str
    resources: dict[str, float]
    began: float
    ended: float
    end: str
    seconds_held: float
    seconds_by_state: dict[str, float]
    price_per_hour: float | None
    cost: float | None


@dataclass(frozen=True)
class RunCost:
    """One run of the job: the first, or one that resumed it.

    Attributes:
        run: its id.
        began, ended: seconds since the epoch.
        end: "done", "stopped", "budget", "errors" (too many), "failed", "running" or "unknown" (its
            driver was killed).
        holders: processes that held resources.
        seconds_held: their seconds, together.
        cost: and what these cost.
    """

    run: str
    began: float
    ended: float
    end: str
    holders: int
    seconds_held: float
    cost: float | None


@dataclass(frozen=True)
class Cost:
    """The money of a job, over all its runs.

    Attributes:
        total: what was spent so far; null if a price is missing (see `unpriced`).
        currency: such as "USD".
        per_million_output_tokens, per_thousand_rows: of completed rows; null without any.
        saved: dollars that the same work would have cost more without speculation, by the measured
            speedup; negative if speculation lost money; null while the speedup is not measured.
        saved_ci: its 95% interval, [low, high].
        seconds_held: seconds for which actors held resources.
        seconds_by_state: what for; see STATES. Sums to `seconds_held` within 1%.
        cost_by_state: the same in money.
        by_actor: one for each process that held resources, in order of time.
        by_run: one for each run, in order of time.
        price_source: where the prices are from, and their date.
        unpriced: hardware without a price.
        reconciled: the check against Ray's events.
        budget: {"dollars": …, "hours": …} of the last run, if it had one.
        hours: hours in which the job ran, over all runs.
    """

    total: float | None
    currency: str
    per_million_output_tokens: float | None
    per_thousand_rows: float | None
    saved: float | None
    saved_ci: list[float] | None
    seconds_held: float
    seconds_by_state: dict[str, float]
    cost_by_state: dict[str, float] | None
    by_actor: list[ProcessCost]
    by_run: list[RunCost]
    price_source: str
    unpriced: list[str] = field(default_factory=list)
    reconciled: Reconciliation | None = None
    budget: dict[str, float | None] | None = None
    hours: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The object under the key `cost`."""
        return asdict(self)


Committed = Mapping[str, Mapping[str, float]]
"""Seconds by state of committed units, by the worker that generated them."""


def committed_seconds(records: Iterable[UnitRecord]) -> Committed:
    """What the committed units took, from their records."""
    return _by_worker(
        (part.actor.worker, part.work.phase_seconds) for each in records for part in parts(each)
    )


def committed_seconds_of(output: Folder) -> Committed:
    """The same of a finished job, from its `stats/`."""
    data = output.read(layout.stats("units"))
    table = pq.read_table(io.BytesIO(data)) if data else None
    if table is None or "worker" not in table.column_names:
        return {}
    rows = table.select(["worker", "phase_seconds"]).to_pylist()
    return _by_worker((row["worker"], json.loads(row["phase_seconds"])) for row in rows)


def _by_worker(units: Iterable[tuple[str, Mapping[str, float]]]) -> Committed:
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for worker, seconds in units:
        for state, value in seconds.items():
            found[worker][state] += value
    return found


def read_cost(
    output: Folder,
    summary: Mapping[str, Any],
    committed: Committed,
    prices: Prices | None = None,
) -> Cost | None:
    """What a job has cost so far; None if it has no ledger.

    Args:
        output: its folder.
        summary: the job in numbers (`stats.summarise`).
        committed: what its committed units took.
        prices: a price table; None: that of its last run.
    """
    runs = read_ledger(output)
    if not runs:
        return None
    return cost_of(runs, summary, committed, prices or _recorded(runs[-1]))


def _recorded(run: Run) -> Prices:
    try:
        return Prices.model_validate(run.prices)
    except ValidationError:
        raise UserError(
            f"the price table of run {run.run} is not readable; give one with --prices"
        ) from None


def cost_of(
    runs: Sequence[Run], summary: Mapping[str, Any], committed: Committed, prices: Prices
) -> Cost:
    """The money of some runs of one job; see `read_cost`."""
    holders, by_run = [], []
    for run in runs:
        mine = [_holder(run, account, committed, prices) for account in run.accounts]
        holders += mine
        by_run.append(
            RunCost(
                run.run,
                run.began,
                run.seen,
                run.end or ("running" if run.alive else "unknown"),
                len(mine),
                sum(holder.seconds_held for holder in mine),
                _sum(holder.cost for holder in mine),
            )
        )
    total = _sum(holder.cost for holder in holders)
    states: dict[str, float] = defaultdict(float)
    money: dict[str, float] = defaultdict(float)
    for holder in holders:
        for state, seconds in holder.seconds_by_state.items():
            states[state] += seconds
            money[state] += seconds * (holder.price_per_hour or 0.0) / 3600
    saved, low, high = (
        _saved(holders, factor)
        for factor in (summary["speedup"], *(summary["speedup_ci"] or (None, None)))
    )
    tokens, rows = summary["output_tokens"], summary["rows"]
    return Cost(
        total=total,
        currency=prices.currency,
        per_million_output_tokens=_ratio(total, tokens, 1e6),
        per_thousand_rows=_ratio(total, rows, 1e3),
        saved=saved,
        saved_ci=None if low is None or high is None else [low, high],
        seconds_held=sum(holder.seconds_held for holder in holders),
        seconds_by_state=_ordered(states),
        cost_by_state=None if total is None else _ordered(money),
        by_actor=sorted(holders, key=lambda holder: holder.began),
        by_run=by_run,
        price_source=prices.described,
        unpriced=sorted({f"{h.hardware} ({h.market})" for h in holders if h.cost is None}),
        reconciled=reconcile(account for run in runs for account in run.accounts),
        budget=dict(runs[-1].budget) if runs[-1].budget else None,
        hours=sum(run.seen - run.began for run in runs) / 3600,
    )


def _holder(run: Run, account: Account, committed: Committed, prices: Prices) -> ProcessCost:
    """What one process cost, with its work on units that it did not commit as lost."""
    priced = price(account.hardware, prices)
    held = account.booked if account.held is None else account.held
    seconds, kept = dict(account.seconds), committed.get(account.worker, {})
    if not run.alive:  # what a running job has in flight is not lost yet
        for state in WORK:
            lost = max(0.0, seconds.get(state, 0.0) - kept.get(state, 0.0))
            seconds[state] = seconds.get(state, 0.0) - lost
            seconds["lost"] = seconds.get("lost", 0.0) + lost
    return ProcessCost(
        run=run.run,
        actor=account.actor,
        node=account.node,
        hardware=priced.hardware,
        market=priced.market,
        resources=dict(account.hardware.resources),
        began=account.began,
        ended=account.seen,
        end=_end(run, account),
        seconds_held=held,
        seconds_by_state=_ordered(seconds),
        price_per_hour=priced.per_hour,
        cost=None if priced.per_hour is None else priced.per_hour * held / 3600,
    )


def _end(run: Run, account: Account) -> str:
    if account.killed:
        return "killed"
    if account.ended is None:
        return "running" if run.alive else "unknown"
    return run.end or "unknown"


def _saved(holders: Iterable[ProcessCost], speedup: float | None) -> float | None:
    """Money that the committed rounds would have cost more without speculation.

    Measuring what forwards cost serves speculation alone, so it is taken off; rounds that ran
    without speculation saved nothing.
    """
    if speedup is None:
        return None
    total = 0.0
    for holder in holders:
        if holder.price_per_hour is None:
            return None
        seconds = holder.seconds_by_state
        rounds = sum(seconds.get(state, 0.0) for state in WORK if state != "control")
        more = (speedup - 1) * rounds - seconds.get("profile", 0.0)
        total += more * holder.price_per_hour / 3600
    return total


def _ordered(seconds: Mapping[str, float]) -> dict[str, float]:
    """States in the order of reports; those that took no time are left out."""
    known = [state for state in STATES if seconds.get(state)]
    return {state: seconds[state] for state in [*known, *sorted(seconds.keys() - set(STATES))]}


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _ratio(total: float | None, amount: float, per: float) -> float | None:
    return None if total is None or not amount else total / amount * per
