"""The Ray that a job runs on: connecting to one or starting one, and room for the actors on it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from tenacity import Retrying, retry_if_exception_message, stop_after_attempt

from pipeline.config.job import ActorsConfig
from pipeline.errors import UserError
from pipeline.generate.pool import check_resources, check_workers

LOCAL_RAY = {"idle_worker_killing_time_threshold_ms": 600_000}
"""Settings of a Ray that is started here. While actors hold all cores, Ray ends the processes that
read and write after a second of idleness. Starting new ones takes seconds of the cores that the
engine should have; within ten minutes they are used again."""


@contextmanager
def connected() -> Iterator[None]:
    """A Ray to run on: the one this process is connected to, RAY_ADDRESS, or a local one."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # On a machine that is busy, a Ray may miss the half minute that it gives itself to start.
    start = Retrying(
        stop=stop_after_attempt(3),
        retry=retry_if_exception_message(match=".*timed out during startup"),
        reraise=True,
    )
    # Ray's own log lines would be torn into the progress bar; logs stay in files.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with _silent_stderr(), _kept_sigterm():
            start(
                ray.init,
                address=address or "local",
                include_dashboard=None if address else False,
                _system_config=None if address else LOCAL_RAY,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except ConnectionError as error:
        raise UserError(f"RAY_ADDRESS: no Ray cluster at {address}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Keep what SIGTERM means; Ray puts handlers of its own there, which end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep Ray's C++ from announcing its log level; what goes wrong comes as an exception."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def placed(actors: ActorsConfig) -> ActorsConfig:
    """The pool as this cluster can hold it, once that is checked."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    actors = actors.on([node["Resources"].get("CPU", 0.0) for node in nodes])
    check_resources(actors, [node["Resources"] for node in nodes])
    check_workers([node["NodeID"] for node in nodes])
    return actors
