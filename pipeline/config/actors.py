"""The section `actors` of the job file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.config.settings import Settings

GroupName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class ActorsConfig(Settings):
    """The pool: each actor holds one draft and target pair and runs one engine.

    With `groups` the pool has actors of several kinds, which take units as they get free. A group
    has all of these settings for itself; what it does not set, it takes from beside `groups`.
    """

    min: int = Field(default=1, ge=1)
    max: int | None = Field(default=None, ge=1, description="null: the same as min")
    num_cpus: float | None = Field(
        default=None,
        gt=0,
        description="cores of an actor, and threads of torch; null: one beside a GPU, or else all "
        "that the cluster has for each",
    )
    num_gpus: float = Field(default=0, ge=0)
    accelerator_type: str | None = Field(default=None, description="Ray's name of it, such as A100")
    slots: int = Field(
        default=64,
        ge=1,
        description="rows that an engine works on at once, if their keys and values fit",
    )
    kv_memory_gb: float | None = Field(
        default=None, gt=0, description="memory for keys and values; null: the engine decides"
    )
    units_in_flight: int | None = Field(
        default=None,
        ge=1,
        description="units handed to an actor at once; null: enough to keep slots full",
    )
    hang_seconds: float | None = Field(
        default=900,
        gt=0,
        description="an engine whose round takes longer than this is restarted; null: never",
    )
    autoscaling_cluster: bool = Field(
        default=False,
        description="true: wait for nodes that the cluster adds instead of refusing to start",
    )
    groups: dict[GroupName, ActorsConfig] = Field(
        default_factory=dict,
        description="kinds of actors by name, such as A100 and L4, each with its own settings",
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
