"""The ledger: every second for which a job held resources, by process and by what it was spent on.

_specbatch/ledger/RUN.json          one run: who held what when, by Ray's events once it has ended
_specbatch/ledger/RUN/WORKER.json   the account of one process, which it writes itself while it runs

A process keeps its own account and posts it to the job's monitor every second, so the driver knows
what a killed actor did. It also writes it to the output every WRITE_SECONDS, so a killed driver
loses no more than these. When the run has ended, its one file replaces the accounts
(`pipeline.observe.run_ledger`).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import psutil

from pipeline.config.prices import Hardware
from pipeline.errors import UserError
from pipeline.layout import LEDGER
from pipeline.storage.folder import Folder

BEAT_SECONDS = 1.0
"""Between two posts of an actor to the monitor."""

SILENT_SECONDS = 5 * BEAT_SECONDS
"""After this long without a word nobody knows what a process did."""

WRITE_SECONDS = 15.0
"""Between two writes of an actor's account to the output."""

ALIVE_SECONDS = 60.0
"""A process whose account is older than this is taken for dead."""

TOLERANCE = 0.01
"""Share by which booked seconds may differ from seconds held."""

WORK = ("prefill", "draft", "decide", "verify", "sample", "host", "control")
"""States in which an engine works on rows; what of them was not committed is lost."""


@dataclass(frozen=True)
class Account:
    """What one process that holds resources has booked.

    Attributes:
        run: the job's run that it belongs to.
        actor, worker, node: Ray's ids. An actor that is restarted goes on as another worker.
        hardware: what it holds.
        began: seconds since the epoch since when it holds it.
        seconds: by state; their sum is the time from `began` to `seen`.
        busy: whether it had units in flight when it was last seen.
        ended: seconds since the epoch when it ended, by Ray's events; None: not known.
        tail: of its seconds, those between its last post and its end.
        held: its time by Ray's events alone; None: not known.
        killed: whether it died of anything but Ray's wish.
    """

    run: str
    actor: str
    worker: str
    node: str
    hardware: Hardware
    began: float
    seconds: Mapping[str, float]
    busy: bool = False
    ended: float | None = None
    tail: float = 0.0
    held: float | None = None
    killed: bool = False

    @property
    def booked(self) -> float:
        """Seconds in the account."""
        return sum(self.seconds.values())

    @property
    def seen(self) -> float:
        """Until when it is booked."""
        return self.began + self.booked

    def since(self, began: float) -> Account:
        """The account with another beginning of its start."""
        start = max(0.0, self.began + self.seconds.get("start", 0.0) - began)
        return replace(self, began=began, seconds={**self.seconds, "start": start})

    def until(self, end: float) -> Account:
        """The account carried on to its end: lost if units were in flight, or else idle."""
        tail = max(0.0, end - self.seen)
        state = "lost" if self.busy else "idle"
        seconds = {**self.seconds, state: self.seconds.get(state, 0.0) + tail}
        return replace(self, seconds=seconds, ended=end, tail=tail)

    def to_json(self) -> bytes:
        """What its file holds."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def of(data: Mapping[str, Any]) -> Account:
        """What `asdict` gave."""
        return Account(**{**data, "hardware": Hardware(**data["hardware"])})


@dataclass(frozen=True)
class Reconciliation:
    """Booked seconds against seconds held by Ray's own actor events.

    Attributes:
        booked: seconds in the accounts. Before a process's first line of code and after its last
            word they are Ray's, in between its own clock's.
        held: seconds between Ray's start and end events of the same processes.
        difference: what of `held` is not accounted for, or is twice, as a share of it: |booked -
            held|, and silences at the end of processes beyond what is usual. None if Ray's events
            are known of no process.
        ok: whether that is within TOLERANCE.
        holders: processes compared.
        tail: of `booked`, seconds between processes' last words and their ends.
        unsettled: processes whose end Ray could not be asked about.
    """

    booked: float
    held: float
    difference: float | None
    ok: bool | None
    holders: int
    tail: float
    unsettled: int


def reconcile(accounts: Iterable[Account]) -> Reconciliation:
    """Compare what was booked with what Ray says."""
    accounts = list(accounts)
    compared = [account for account in accounts if account.held is not None]
    held = sum(account.held or 0.0 for account in compared)
    off = sum(
        abs(account.booked - (account.held or 0.0)) + max(0.0, account.tail - SILENT_SECONDS)
        for account in compared
    )
    difference = off / held if held else None
    return Reconciliation(
        sum(account.booked for account in compared),
        held,
        difference,
        None if difference is None else difference <= TOLERANCE,
        len(compared),
        sum(account.tail for account in compared),
        sum(account.ended is None for account in accounts),
    )


@dataclass(frozen=True)
class Run:
    """One run of a job.

    Attributes:
        run: its id, which begins with its time.
        began: seconds since the epoch.
        ended: None: it runs, or its driver was killed.
        end: "done", "stopped", "budget", "errors" (too many) or "failed"; None with `ended`.
        prices: the price table it ran with.
        budget: its budget, if it had one.
        accounts: of its processes.
        reconciled: the check against Ray's events when it ended.
    """

    run: str
    began: float
    ended: float | None = None
    end: str | None = None
    prices: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] | None = None
    accounts: tuple[Account, ...] = ()
    reconciled: Mapping[str, Any] | None = None

    @property
    def seen(self) -> float:
        """When it ended, or was last heard of."""
        return self.ended or max([self.began, *(account.seen for account in self.accounts)])

    @property
    def alive(self) -> bool:
        """Whether it seems to be running."""
        return self.ended is None and time.time() - self.seen < ALIVE_SECONDS

    def to_json(self) -> bytes:
        """What its file holds."""
        return json.dumps(asdict(self), default=str).encode()

    @staticmethod
    def from_json(data: bytes) -> Run:
        """What `to_json` wrote."""
        values = json.loads(data)
        accounts = tuple(Account.of(account) for account in values.pop("accounts"))
        return Run(**values, accounts=accounts)


def new_run() -> str:
    """An id for a run; ids sort by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def read_ledger(output: Folder) -> list[Run]:
    """All runs of a job, settled or not, in order of time.

    Raises:
        UserError: a file is not what it should be.
    """
    runs = []
    for name in sorted(output.list(LEDGER)):
        data = output.read(f"{LEDGER}/{name}") if name.endswith(".json") else None
        if data is None:
            continue
        try:
            run = Run.from_json(data)
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{output.join(f'{LEDGER}/{name}')}: not what specbatch wrote; move it away"
            ) from None
        if run.ended is None:
            run = replace(run, accounts=tuple(_accounts(output, run.run)))
        runs.append(run)
    return runs


def write_run(output: Folder, run: Run) -> None:
    """Write a run's file; once it has ended, remove the accounts that it then holds."""
    output.put(f"{LEDGER}/{run.run}.json", run.to_json())
    if run.ended is not None:
        for name in output.list(f"{LEDGER}/{run.run}"):
            output.delete(f"{LEDGER}/{run.run}/{name}")


def _accounts(output: Folder, run: str) -> Iterable[Account]:
    for name in sorted(output.list(f"{LEDGER}/{run}")):
        if data := output.read(f"{LEDGER}/{run}/{name}"):
            yield Account.of(json.loads(data))


# --------------------------------------------------------------- in the process


class Timesheet:
    """Keeps the account of this process: from its start to its end, in a thread of its own.

    Args:
        run: the run of the job.
        output: where the account is written.
        post: called with the account every second; must not wait.
    """

    def __init__(self, run: Run, output: Folder, post: Callable[[Account], object]) -> None:
        import ray

        now = time.monotonic()
        context = ray.get_runtime_context()
        # Until the engine runs, all that has passed is loading.
        self._began = now
        self._work: Callable[[], dict[str, float]] = lambda: {"load": time.monotonic() - now}
        self._busy: Callable[[], bool] = lambda: False
        start = 0.0 if _ready_made(run.began) else process_age()
        self._loaded: dict[str, float] = {"start": start}
        self._account = Account(
            run=run.run,
            actor=context.get_actor_id() or "local",
            worker=context.get_worker_id(),
            node=context.get_node_id(),
            hardware=this_hardware(),
            began=time.time() - start,
            seconds={},
        )
        self._output, self._post = output, post
        self._wake = threading.Event()
        threading.Thread(target=self._run, name="timesheet", daemon=True).start()

    @property
    def worker(self) -> str:
        """Ray's id of this process."""
        return self._account.worker

    def loaded(self, work: Callable[[], dict[str, float]], busy: Callable[[], bool]) -> None:
        """From now on `work` tells the seconds by state, and `busy` whether units are in flight."""
        load = time.monotonic() - self._began - sum(work().values())
        self._loaded = {**self._loaded, "load": load}
        self._work, self._busy = work, busy

    def account(self) -> Account:
        """The account as it is now."""
        busy = self._busy()
        return replace(self._account, seconds={**self._loaded, **self._work()}, busy=busy)

    def nudge(self) -> None:
        """Post soon: something has ended."""
        self._wake.set()

    def _run(self) -> None:
        written = 0.0
        while True:
            self._wake.clear()
            account = self.account()
            self._post(account)
            if time.monotonic() - written > WRITE_SECONDS:
                written = time.monotonic()
                self._write(account)
            self._wake.wait(BEAT_SECONDS)

    def _write(self, account: Account) -> None:
        try:
            self._output.put(f"{LEDGER}/{account.run}/{account.worker}.json", account.to_json())
        except Exception:  # a ledger that cannot be written must not end the work
            logging.getLogger(__name__).exception("the ledger could not be written")


def _ready_made(run_began: float) -> bool:
    """Whether this process was there before its actor, and held nothing until now.

    Ray may give an actor a process that it had ready, or that ran tasks before.
    """
    from ray._private.worker import global_worker

    manager = getattr(global_worker, "function_actor_manager", None)
    ran = getattr(manager, "_num_task_executions", {})
    return time.time() - process_age() < run_began or any(number for number in ran.values())


def process_age() -> float:
    """Seconds since this process was created."""
    process = psutil.Process()
    if hasattr(time, "CLOCK_BOOTTIME"):
        # Creation time counts from the machine's start, whose date is only known to a second.
        since_boot = process.create_time() - psutil.boot_time()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    return time.time() - process.create_time()


def this_hardware() -> Hardware:
    """What this actor holds, and what its node says about itself."""
    import ray

    context = ray.get_runtime_context()
    held: Mapping[str, float] = context.get_assigned_resources()  # type: ignore[no-untyped-call]
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    found = [node for node in nodes if node["NodeID"] == context.get_node_id()]
    node = found[0] if found else {"Resources": {}, "Labels": {}}
    labels: Mapping[str, str] = node.get("Labels") or {}
    whole: Mapping[str, float] = node["Resources"]
    types = [n.partition(":")[2] for n in whole if n.startswith("accelerator_type:")]
    instance = (
        labels.get("node.kubernetes.io/instance-type")
        or labels.get("instance-type")
        or os.environ.get("RAY_CLOUD_INSTANCE_TYPE_NAME")
    )
    market = labels.get("ray.io/market-type", "").replace("-", "_") or None
    return Hardware(
        resources={name: float(held[name]) for name in ("CPU", "GPU") if held.get(name)},
        node_resources={name: float(whole[name]) for name in ("CPU", "GPU") if whole.get(name)},
        instance_type=instance or None,
        gpu_type=labels.get("ray.io/accelerator-type") or (types[0] if types else None),
        market=market if market in ("on_demand", "spot") else None,
    )
