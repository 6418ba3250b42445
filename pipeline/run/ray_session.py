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
from pipeline.errors import JobStopped, TooManyErrors, UserError
from pipeline.generate.pool import check_resources, check_workers
from pipeline.run.ray_address import find_cluster
from pipeline.run.ray_log import RayLog, ray_log

LOCAL_RAY = {"idle_worker_killing_time_threshold_ms": 600_000}
"""Settings of a Ray that is started here. While actors hold all cores, Ray ends the processes that
read and write after a second of idleness. Starting new ones takes seconds of the cores that the
engine should have; within ten minutes they are used again."""

_LONGEST_FOLDER = 107 - len("/session_2026-11-28_19-44-56_709613_4194304/sockets/plasma_store")
"""Bytes in the path of Ray's folder: Linux takes 107 in that of a socket, which Ray makes in it."""

_SHORT_FOLDER = "/tmp/ray"


@contextmanager
def connected() -> Iterator[None]:
    """A Ray to run on: the one this process is connected to, RAY_ADDRESS, or a local one.

    What Ray says meanwhile goes into a file; an error that is not the user's names it.

    Raises:
        UserError: there is no Ray at RAY_ADDRESS, or it refuses this process.
    """
    if ray.is_initialized():
        yield
        return
    with ray_log() as log:
        try:
            _connect(log)
            yield
        except (UserError, JobStopped, TooManyErrors):
            raise
        except Exception as error:
            log.explain(error)
            raise
        finally:
            ray.shutdown()


def _connect(log: RayLog) -> None:
    with log.taking_stderr(), _kept_signals():
        address = find_cluster()
        if address is None:
            _start()
            return
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:  # such as another version
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(
                f"RAY_ADDRESS: the Ray cluster at {address} cannot be used from here: {reason}"
            ) from None


def _start() -> None:
    """Start a local Ray."""
    # On a machine that is busy, a Ray may miss the half minute that it gives itself to start.
    start = Retrying(
        stop=stop_after_attempt(3),
        retry=retry_if_exception_message(match=".*timed out during startup"),
        reraise=True,
    )
    start(
        ray.init,
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _system_config=LOCAL_RAY,
        _temp_dir=_short_folder(),
    )


def _short_folder() -> str | None:
    """Where Ray puts its files, if it cannot be where Ray would put them."""
    base = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return _SHORT_FOLDER if len(os.fsencode(f"{base}/ray")) > _LONGEST_FOLDER else None


@contextmanager
def _kept_signals() -> Iterator[None]:
    """Keep what signals mean while Ray is set up.

    Ray puts handlers of its own on SIGTERM, which end the process. Its processes inherit that
    SIGHUP is blocked: when a terminal is closed, the job still commits what is in flight.
    """
    handler = signal.getsignal(signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def placed(actors: ActorsConfig) -> ActorsConfig:
    """The pool as this cluster can hold it, once that is checked."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    actors = actors.on([node["Resources"].get("CPU", 0.0) for node in nodes])
    check_resources(actors, [node["Resources"] for node in nodes])
    check_workers([node["NodeID"] for node in nodes])
    return actors
