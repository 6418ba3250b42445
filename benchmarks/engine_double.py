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
from unittest.mock import patch

import ray

from pipeline.config.job import JobConfig
from pipeline.generate import actor as generate
from pipeline.run import dataflow
from specdec.engine.stats import EngineStats
from specdec.policies.registry import make_policy
from specdec.request import Completion, Counts, Request

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `tests` is not installed

from tests.chaos import small_cluster


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


@contextmanager
def cluster(nodes: int, cpus: int, seconds_per_row: float = 0.0) -> Iterator[None]:
    """Several raylets whose jobs have `DoubleActor`s, and this process as the driver."""
    environment = {"DOUBLE_SECONDS": str(seconds_per_row)}
    with (
        patch.object(dataflow, "GenerateActor", DoubleActor),
        patch.dict(os.environ, environment),
        small_cluster(nodes, cpus, object_store=500 * 2**20) as raylets,
    ):
        ray.init(address=raylets.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield
        finally:
            ray.shutdown()
