"""An engine that completes every request at once, and a cluster whose jobs run on it."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray.cluster_utils import Cluster

from pipeline.config.job import JobConfig
from pipeline.generate import actor as generate
from pipeline.run import run as run_module
from specdec.engine.engine import EngineStats
from specdec.policies.registry import make_policy
from specdec.request import Completion, Counts, Request

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # `tests`, whose helpers some benchmarks use, is not installed


class InstantEngine:
    """Completes every request with one token in the step after it was submitted.

    Args:
        token: the token.
        seconds: how long a step sleeps for each of its requests.
    """

    def __init__(self, token: int, seconds: float) -> None:
        self.stats = EngineStats()
        self.policy = make_policy("none")
        self._token, self._seconds = token, seconds
        self._queue: deque[Request] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._queue)

    @property
    def live(self) -> int:
        return 0

    @property
    def live_ids(self) -> list[str]:
        return []

    def submit(self, request: Request) -> None:
        self._queue.append(request)

    def step(self) -> list[Completion]:
        requests = [self._queue.popleft() for _ in range(min(64, len(self._queue)))]
        if self._seconds:
            time.sleep(self._seconds * len(requests))
        counts = Counts(rounds=1, committed=1)
        for _ in requests:
            self.stats.counts.add(counts)
        return [
            Completion(r.id, len(r.prompt_ids), (self._token,), "length", counts=counts)
            for r in requests
        ]


class DoubleActor(generate.GenerateActor):
    """A `GenerateActor` of which the models and the engine are not there."""

    def __init__(self, job: JobConfig, *rest: Any) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(job.models.target)
        generate.load_pair = lambda job: SimpleNamespace(tokenizer=tokenizer, context_length=1000)
        super().__init__(job, *rest)

    def _make_engine(self) -> Any:
        seconds = float(os.environ.get("DOUBLE_SECONDS", "0"))
        return InstantEngine(len(self._pair.tokenizer) - 1, seconds)


run_module.GenerateActor = DoubleActor  # type: ignore[misc]


@contextmanager
def cluster(nodes: int, cpus: int, seconds_per_row: float = 0.0) -> Iterator[None]:
    """Several raylets, to which this process is connected as the driver."""
    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_BACKEND_LOG_LEVEL": "fatal"}
    os.environ["DOUBLE_SECONDS"] = str(seconds_per_row)
    raylets = Cluster()
    raylets.add_node(
        num_cpus=0,
        include_dashboard=False,
        object_store_memory=500 * 2**20,
        _system_config=run_module.LOCAL_RAY,
    )
    for _ in range(nodes):
        raylets.add_node(num_cpus=cpus, object_store_memory=500 * 2**20)
    ray.init(address=raylets.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
        raylets.shutdown()
