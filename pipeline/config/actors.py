"""The section `actors` of the job file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.config.section import Section, example

GroupName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class ActorsConfig(Section):
    """The pool: each actor holds one draft and target pair and runs one engine.

    With `groups` the pool has actors of several kinds, which take units as they get free. A group
    has all of these settings for itself; what it does not set, it takes from beside `groups`.
    """

    model_config = example(
        {
            "num_gpus": 1,
            "groups": {
                "A100": {"min": 1, "max": 2, "accelerator_type": "A100", "slots": 64},
                "L4": {"min": 1, "max": 8, "accelerator_type": "L4", "slots": 16},
            },
        }
    )

    min: int = Field(default=1, ge=1, description="Actors that the pool starts with and keeps.")
    max: int | None = Field(
        default=None,
        ge=1,
        description="Most actors: the pool grows to this while there is work for them. `null`: "
        "the same as `min`.",
    )
    num_cpus: float | None = Field(
        default=None,
        gt=0,
        description="Cores of an actor, and threads of torch. `null`: 1 beside a GPU, or else an "
        "equal share of the cluster's cores.",
    )
    num_gpus: float = Field(
        default=0, ge=0, description="GPUs of an actor. `0.5` lets two actors share one."
    )
    accelerator_type: str | None = Field(
        default=None, description="Kind of GPU, by Ray's name for it, such as `A100`. `null`: any."
    )
    slots: int = Field(
        default=64,
        ge=1,
        description="Rows that an engine works on at once, if their keys and values fit into "
        "memory.",
    )
    kv_memory_gb: float | None = Field(
        default=None,
        gt=0,
        description="Memory for keys and values, in GB. `null`: half of what is free when the "
        "models are loaded, or, where several actors fit a node, an actor's share of that: by its "
        "cores, or by its part of a GPU.",
    )
    units_in_flight: int | None = Field(
        default=None,
        ge=1,
        description="Units that an actor is handed at once; neighbours with few rows to do count "
        "as one. `null`: enough to keep its slots full.",
    )
    hang_seconds: float | None = Field(
        default=900,
        gt=0,
        description="Restart an engine whose round takes longer than this, in seconds. `null`: "
        "never.",
    )
    autoscaling_cluster: bool = Field(
        default=False,
        description="Wait for nodes that the cluster adds, instead of refusing to start without "
        "them.",
    )
    groups: dict[GroupName, ActorsConfig] = Field(
        default_factory=dict,
        description="Kinds of actors by a name of your own, such as `A100` and `L4`, each with "
        "settings as in this section. What a group leaves out it takes from beside "
        "`groups`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _groups_inherit(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(groups := values.get("groups"), dict):
            return values
        shared = {key: value for key, value in values.items() if key != "groups"}
        inherited = {
            name: {**shared, **(group or {})} if isinstance(group, dict | None) else group
            for name, group in groups.items()
        }
        return {**values, "groups": inherited}

    @model_validator(mode="after")
    def _ordered(self) -> ActorsConfig:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is less than min ({self.min})")
        for name, group in self.groups.items():
            if group.groups:
                raise ValueError(f"groups.{name}: a group cannot have groups of its own")
        return self

    @property
    def cores(self) -> float:
        """`num_cpus`, or the least that null may stand for."""
        return self.num_cpus or 1.0

    def memory_share(self, node_cores: float) -> float:
        """The part of a node's memory, or a GPU's, that is an actor's, on a node of so many cores.

        With an actor of that size in every other place, too, all together have what there is.
        """
        return min(1.0, self.num_gpus or self.cores / node_cores)

    def on(self, nodes: Sequence[float]) -> ActorsConfig:
        """These settings with `num_cpus` filled in, for nodes of so many cores."""
        groups = {name: group.on(nodes) for name, group in self.groups.items()}
        share = sum(nodes) // self.max_actors
        most = min((cores for cores in nodes if cores), default=1.0)
        cores = 1.0 if self.num_gpus else max(1.0, min(share, most))
        return self.model_copy(update={"groups": groups, "num_cpus": self.num_cpus or cores})

    @property
    def pools(self) -> dict[str, ActorsConfig]:
        """The groups by name; a pool of one kind is a single group without a name."""
        return dict(self.groups) or {"": self}

    @property
    def min_actors(self) -> int:
        """Least actors, of all groups together."""
        return sum(group.min for group in self.pools.values())

    @property
    def max_actors(self) -> int:
        """Most actors, of all groups together."""
        return sum(group.max or group.min for group in self.pools.values())
