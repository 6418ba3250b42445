"""The actors' places on the cluster: do they fit, can its nodes import us, which group is next."""

from __future__ import annotations

import gc
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config.job import ActorsConfig
from pipeline.errors import UserError

_PROBE_SECONDS = 60
"""For which nodes are asked what they can import. Less trusts more nodes that are only busy."""

_NEEDED = ("pipeline.generate.actor", "specdec.engine.engine", "torch", "transformers", "pyarrow")
"""Modules that an actor is made of. Of ours, ones that no other project has: a package called
`pipeline` or `specdec` may be anybody's."""


def check_resources(actors: ActorsConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Check that the cluster can hold the smallest pool asked for, instead of waiting for ever.

    Args:
        actors: the pool.
        nodes: resources of each live node, as Ray names them.

    Raises:
        UserError: names the group and the resource that is short, and what the cluster has.
    """
    free = [dict(node) for node in nodes]
    for name, group in actors.pools.items():
        if group.autoscaling_cluster:
            continue
        where = f"actors.groups.{name}" if name else "actors"
        need = needed(group)
        fix = f"ask for less in {where}, or set actors.autoscaling_cluster: true if it adds nodes"
        for resource, amount in need.items():
            most = max((node.get(resource, 0.0) for node in nodes), default=0.0)
            if amount > most:
                raise UserError(
                    f"{where}: an actor needs {amount:g} {resource}, but the largest node of this "
                    f"Ray cluster has {most:g}; {fix}"
                )
        placed = sum(_take(need, free) for _ in range(group.min))
        if placed < group.min:
            asked = ", ".join(f"{amount:g} {resource}" for resource, amount in need.items())
            beside = " beside the other groups" if name else ""
            raise UserError(
                f"{where}.min: {group.min} actors of {asked} do not fit on this Ray cluster"
                f"{beside}, only {placed}; {fix}"
            )


def needed(group: ActorsConfig) -> dict[str, float]:
    """What an actor of a group takes of a node, as Ray names it."""
    need = {"CPU": group.cores, "GPU": group.num_gpus}
    if group.accelerator_type:
        # Ray marks a node that has accelerators of a type with one unit of this resource.
        need[f"accelerator_type:{group.accelerator_type}"] = 0.001
    return {resource: amount for resource, amount in need.items() if amount}


def _take(need: Mapping[str, float], free: list[dict[str, float]]) -> bool:
    """Take what an actor needs from the first node that has it. False if none has."""
    for node in free:
        if all(node.get(resource, 0.0) >= amount for resource, amount in need.items()):
            for resource, amount in need.items():
                node[resource] -= amount
            return True
    return False


def check_workers(nodes: Sequence[str]) -> None:
    """Check that every node can import what actors are made of; otherwise they die one by one.

    Args:
        nodes: ids of the live nodes.

    Raises:
        UserError: names the node and what it lacks.
    """
    probe = ray.remote(num_cpus=0)(_probe())
    answers = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        answers[probe.options(scheduling_strategy=there).remote(_NEEDED)] = node
    # A node that is too busy to say is taken on trust.
    said, _ = ray.wait(list(answers), num_returns=len(answers), timeout=_PROBE_SECONDS)
    for answer in said:
        node = answers[answer]
        try:
            lacking = ray.get(answer)
        except RayError:
            continue  # it has left meanwhile
        if lacking:
            raise UserError(
                f"node {node[:8]} of the Ray cluster cannot import {', '.join(lacking)}; install "
                "specbatch there in the Python that Ray runs, or name it in a runtime_env"
            )


def _probe() -> Callable[[Sequence[str]], list[str]]:
    """What a node runs: of some modules, those that it cannot find."""

    # A function inside a function travels by value, so nodes that lack this module can run it.
    def missing(modules: Sequence[str]) -> list[str]:
        from importlib.util import find_spec

        def found(module: str) -> bool:
            try:
                return find_spec(module) is not None
            except Exception:  # of a parent that is another project's, whatever that does
                return False

        return [module for module in modules if not found(module)]

    return missing


# ------------------------------------------------------------------------ groups


def next_group(
    actors: ActorsConfig, alive: Mapping[str, int], free: Mapping[str, float]
) -> str | None:
    """Which group a new actor belongs to: one below its min, else one with room.

    Of several groups with room, one whose resources are free, and of these the first in the job
    file.

    Args:
        actors: the pool; has groups.
        alive: actors of each group that there are or will be.
        free: unused resources of the cluster.

    Returns:
        Its name; None if all groups are full.
    """
    below = [name for name, group in actors.groups.items() if alive.get(name, 0) < group.min]
    room = [
        name
        for name, group in actors.groups.items()
        if alive.get(name, 0) < (group.max or group.min)
    ]
    now = [
        name
        for name in room
        if all(free.get(r, 0.0) >= amount for r, amount in needed(actors.groups[name]).items())
    ]
    return next(iter([*below, *now, *room]), None)


def actor_options(actors: ActorsConfig) -> dict[str, Any]:
    """The `map_batches` options that say what each actor takes of a node.

    An actor of a group is named GROUP/NUMBER: that is how it knows which one it belongs to, also
    after Ray has restarted it somewhere else.
    """
    if not actors.groups:
        return _resources(actors)
    groups = actors.groups.values()
    return {
        # What Ray Data reckons with before it makes an actor, and makes then as it is told.
        "num_cpus": min(group.cores for group in groups),
        "num_gpus": min(group.num_gpus for group in groups) or None,
        "ray_remote_args_fn": _group_options(actors),
    }


def _group_options(actors: ActorsConfig) -> Callable[[], dict[str, Any]]:
    def options() -> dict[str, Any]:
        alive = Counter(group_of(name) for name in list_named_actors())
        name = next_group(actors, alive, ray.available_resources())  # type: ignore[no-untyped-call]
        if name is None:  # one that is on its way out still counts
            name = next(iter(actors.groups))
        return {**_resources(actors.groups[name]), "name": f"{name}/{uuid.uuid4().hex[:8]}"}

    return options


def give_back(failed: BaseException) -> None:
    """Let go of the actors of a Ray Data job that failed.

    Ray ends an actor when nothing refers to it any more. After a failure the frames of the error's
    traceback do, and then objects that refer to each other: without this the next job of the same
    process could wait for ever for what this one holds.
    """
    error: BaseException | None = failed
    while error is not None:
        error.__traceback__ = None
        error = error.__context__
    gc.collect()


def group_of(actor_name: str | None) -> str:
    """The group in an actor's name; empty if the pool has none."""
    return actor_name.partition("/")[0] if actor_name else ""


def _resources(group: ActorsConfig) -> dict[str, Any]:
    return {
        "num_cpus": group.cores,
        "num_gpus": group.num_gpus or None,
        "accelerator_type": group.accelerator_type,
    }
