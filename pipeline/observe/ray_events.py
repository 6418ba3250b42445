"""What Ray itself recorded about processes: since when and until when they held resources.

Ray's public state API needs the dashboard, which a local Ray does not run; this module reads the
tables behind it. They are not a promise of Ray's: without them the ledger is only not checked.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import ray

_SECONDS_TO_DIE = 10.0
"""For which the end of a process is waited for. Less leaves more accounts without an end; more
makes the end of a job later if a process hangs."""

_NEVER = 2**63  # milliseconds; an unset time is more than this
_CLASS = "MapWorker("  # what Ray Data calls the classes of its actors


@dataclass(frozen=True)
class Lifetime:
    """When a process of an actor held resources, by Ray's events.

    Attributes:
        actor, worker, node: Ray's ids.
        resources: what it held, such as {"CPU": 2.0}.
        began, ended: seconds since the epoch; None: not recorded.
        killed: whether it ended by itself or by the system's hand, not because Ray wanted it to.
    """

    actor: str
    worker: str
    node: str
    resources: dict[str, float]
    began: float | None
    ended: float | None
    killed: bool


def actor_lifetimes(
    actors: Collection[str], since: float | None = None, wait: float = _SECONDS_TO_DIE
) -> dict[str, Lifetime]:
    """Lifetimes of actors' processes, by worker id; empty if Ray's tables cannot be read.

    A process holds resources from when Ray launches it for the actor; or, if Ray took one that was
    there, from when it runs the actor's constructor; or, when an actor is restarted in such a one,
    from the end of its predecessor.

    Args:
        actors: Ray's actor ids.
        since: also Ray Data's actors that this driver started since then, whose ids may not be
            known as they died before they could say anything.
        wait: seconds to wait for processes that are about to end.
    """
    try:
        deadline = time.monotonic() + wait
        found = _look(actors, since)
        while any(life.ended is None for life in found.values()) and time.monotonic() < deadline:
            time.sleep(0.1)
            found = _look(actors, since)
        return found
    except Exception:  # another version of Ray, or its head node is gone
        logging.getLogger(__name__).warning("Ray's actor events could not be read", exc_info=True)
        return {}


def _look(actors: Collection[str], since: float | None) -> dict[str, Lifetime]:
    from ray._private.state import state

    gcs, common = _messages("gcs"), _messages("common")
    accessor: Any = state._connect_and_get_accessor()
    this_job = ray.get_runtime_context().get_job_id()
    workers = {}
    for data in accessor.get_worker_table():
        worker = gcs.WorkerTableData.FromString(data)
        workers[worker.worker_address.worker_id.hex()] = worker
    created = _creations(accessor)
    found: dict[str, Lifetime] = {}
    for data in accessor.get_actor_table(None, None):
        row = gcs.ActorTableData.FromString(data)
        actor = row.actor_id.hex()
        wanted, running = created.get(actor, (None, None))
        ours = row.class_name.startswith(_CLASS) and row.job_id.hex() == this_job
        if actor not in actors and not (ours and since and (wanted or 0) >= since):
            continue
        lives = [(life.worker_id.hex(), life.node_id.hex()) for life in row.previous_incarnations]
        if row.address.worker_id:
            lives.append((row.address.worker_id.hex(), row.address.node_id.hex()))
        before: float | None = None
        for number, (life, node) in enumerate(lives):
            launched = _seconds(workers[life].worker_launch_time_ms) if life in workers else None
            ended = _seconds(workers[life].end_time_ms) if life in workers else None
            since_when = wanted if number == 0 else before
            began = None
            if launched is not None and since_when is not None:
                ready_made = launched < since_when
                began = (running if number == 0 else before) if ready_made else launched
            killed = ended is not None and workers[life].exit_type not in (
                common.INTENDED_SYSTEM_EXIT,
                common.INTENDED_USER_EXIT,
            )
            resources = dict(row.required_resources)
            found[life] = Lifetime(actor, life, node, resources, began, ended, killed)
            before = ended
    return found


def _creations(accessor: Any) -> dict[str, tuple[float | None, float | None]]:
    """By actor: when it first asked for a node, and when its constructor first ran."""
    gcs, common = _messages("gcs"), _messages("common")
    found = {}
    for data in accessor.get_task_events():
        event = gcs.TaskEvents.FromString(data)
        if event.task_info.type == common.ACTOR_CREATION_TASK:
            times = event.state_updates.state_ts_ns
            wanted, running = (
                times[state] / 1e9 if state in times else None
                for state in (common.PENDING_NODE_ASSIGNMENT, common.RUNNING)
            )
            found[event.task_info.actor_id.hex()] = (wanted, running)
    return found


def _messages(name: str) -> Any:
    """Ray's generated protocol messages; they have no types."""
    return importlib.import_module(f"ray.core.generated.{name}_pb2")


def _seconds(milliseconds: int) -> float | None:
    return milliseconds / 1000 if 0 < milliseconds < _NEVER else None
