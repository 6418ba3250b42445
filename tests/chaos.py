"""Kills parts of a running job at random moments and starts it again until it is done.

The cluster is several raylets on this machine (`ray.cluster_utils.Cluster`), each with processes of
its own that die with it; the driver is `specbatch run` in a process of its own.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from pipeline.run.ray_session import LOCAL_RAY
from tests.pipeline.small_jobs import launched

ROOT = Path(__file__).parents[1]
KINDS = ("actor", "node", "driver", "worker")
_WORKERS = ("ray::Read", "ray::Write", "ray::Monitor")
_POLL_SECONDS = 0.2
_PATIENCE = 120.0
"""Seconds that something to kill is waited for: after a driver, actors must start again first."""
_DEATHS_ARE_NOTICED = {"health_check_period_ms": 500}
"""A node is dead that five checks in a row did not reach. With Ray's own 3 s between two of them a
test does nothing for a quarter of a minute; one that answers late has its 10 s still."""
_OBJECT_STORE = 80 * 2**20
"""Bytes of a node's object store: little more than Ray's least, so that many nodes fit."""


@contextmanager
def small_cluster(
    nodes: int, cpus: int = 1, object_store: int = _OBJECT_STORE, **head: Any
) -> Iterator[Cluster]:
    """A cluster of a head without cores, where the driver is, and nodes with some.

    Everything in it has this process's environment, and finds the packages where they are.
    """
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_BACKEND_LOG_LEVEL": "fatal"}
    cluster = Cluster()
    try:
        cluster.add_node(
            num_cpus=0,
            include_dashboard=False,
            object_store_memory=object_store,
            _system_config={**LOCAL_RAY, **_DEATHS_ARE_NOTICED},
            **head,
        )
        for _ in range(nodes):
            add_node(cluster, object_store, num_cpus=cpus)
        yield cluster
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ |= before


def add_node(cluster: Cluster, object_store: int = _OBJECT_STORE, **options: Any) -> None:
    """One more node, ready when this returns."""
    cluster.add_node(object_store_memory=object_store, **options)


@dataclass
class Chaos:
    """One job on one cluster, and the seed that decides what dies when.

    Attributes:
        cluster: where it runs.
        values: the job file.
        folder: where the job file and the driver's output are written.
        units: how many units the job has.
        committed: how many of them are committed now.
        seed: of all that is random here.
        killed: what was killed, and how often.
        ended: what drivers printed that ended by themselves before the job was done.
        drivers: how many drivers were started.
    """

    cluster: Cluster
    values: dict[str, Any]
    folder: Path
    units: int
    committed: Callable[[], int]
    seed: int
    killed: Counter[str] = field(default_factory=Counter)
    ended: list[str] = field(default_factory=list)
    drivers: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._driver: subprocess.Popen[bytes] | None = None

    def run(self, kinds: Sequence[str], seconds: float) -> None:
        """Run the job to its end and kill one thing of each kind named, in random order.

        Every kill has its share of the job that must be committed first, chosen at random, so all
        of them happen before the job is done.

        Raises:
            TimeoutError: the job was not done after so many seconds.
        """
        deadline = time.monotonic() + seconds
        shares = sorted(self._random.random() * 0.75 for _ in kinds)
        plan = list(zip(shares, self._random.sample(kinds, len(kinds)), strict=True))
        try:
            while not self._done():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done after {seconds:g} s: {self.describe()}")
                time.sleep(_POLL_SECONDS)
                if plan and self.committed() >= plan[0][0] * self.units:
                    time.sleep(self._random.random())
                    self._kill(plan.pop(0)[1])
        finally:
            if self._driver is not None:
                self._driver.kill()
                self._driver.wait()

    def describe(self) -> str:
        """What has happened so far."""
        return (
            f"{self.committed()}/{self.units} units, {self.drivers} drivers, killed "
            f"{dict(self.killed)}, ended {self.ended}, log:\n{self._log().read_text()[-2000:]}"
        )

    def _done(self) -> bool:
        """Whether the job is done. Starts a driver if there is none."""
        if self._driver is not None:
            code = self._driver.poll()
            if code is None:
                return False
            self._driver = None
            if code == 0:
                return True
            self.ended.append(f"exit {code}: {self._log().read_text()[-1000:]}")
        self._start()
        return False

    def _log(self) -> Path:
        return self.folder / f"driver-{self.drivers}.log"

    def _start(self) -> None:
        self.drivers += 1
        with self._log().open("w") as log:
            self._driver = launched(
                self.values,
                self.folder / "job.yaml",
                "--quiet",
                address=self.cluster.address,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _kill(self, kind: str) -> None:
        """Kill one thing of a kind, as soon as there is one."""
        deadline = time.monotonic() + _PATIENCE
        kill = {"actor": self._kill_actor, "worker": self._kill_worker, "node": self._kill_node}
        if kind == "driver":
            kill["driver"] = self._kill_driver
        while not kill[kind]():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {kind} to kill: {self.describe()}")
            if self._driver is not None and self._driver.poll() is not None:
                return  # the job has ended meanwhile
            time.sleep(_POLL_SECONDS)
        self.killed[kind] += 1

    def _kill_driver(self) -> bool:
        if self._driver is None or self._driver.poll() is not None:
            return False
        self._driver.kill()
        self._driver.wait()
        self._driver = None
        return True

    def _kill_node(self) -> bool:
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: str(node.unique_id))
        node = self._random.choice(nodes)
        cpus = int(node._ray_params.num_cpus)
        self.cluster.remove_node(node, allow_graceful=False)
        time.sleep(self._random.random())
        add_node(self.cluster, num_cpus=cpus)
        return True

    def _kill_actor(self) -> bool:
        return self._kill_one(actors(self.cluster))

    def _kill_worker(self) -> bool:
        """A process that reads or writes units, or keeps the account of them."""
        return self._kill_one(processes(self.cluster, lambda title: title.startswith(_WORKERS)))

    def _kill_one(self, found: Sequence[psutil.Process]) -> bool:
        if not found:
            return False
        with suppress(psutil.NoSuchProcess):
            self._random.choice(found).kill()
            return True
        return False


def processes(cluster: Cluster, wanted: Callable[[str], bool]) -> list[psutil.Process]:
    """Worker processes of all nodes whose title (such as `ray::Write`) is a wanted one."""
    found = []
    for node in cluster.list_all_nodes():
        for info in node.all_processes.get("raylet", []):
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(info.process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess, IndexError):
                        if wanted(process.cmdline()[0]):
                            found.append(process)
    return found


def actors(cluster: Cluster) -> list[psutil.Process]:
    """The processes of the job's actors."""
    return processes(cluster, _is_actor)


def _is_actor(title: str) -> bool:
    return "GenerateActor" in title
