"""The job as data: what a job file may say, checked as far as it can be without reading input.

Everything here is frozen and plain, so a job can be validated, hashed, sent to workers and
recorded. The names are an interface: add to them, do not rename them.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.config.actors import ActorsConfig
from pipeline.config.input import InputConfig
from pipeline.config.models import ModelsConfig
from pipeline.config.prices import Prices
from pipeline.config.s3 import S3Config
from pipeline.config.sampling import MAX_SAMPLES, SamplingConfig
from pipeline.config.settings import PlainString, Settings
from pipeline.config.speculation import (
    ESTIMATING_POLICIES,
    THRESHOLD_POLICIES,
    Estimator,
    Policy,
    SpeculationConfig,
)

__all__ = [
    "ESTIMATING_POLICIES",
    "MAX_SAMPLES",
    "THRESHOLD_POLICIES",
    "ActorsConfig",
    "BudgetConfig",
    "Estimator",
    "InputConfig",
    "JobConfig",
    "ModelsConfig",
    "Policy",
    "S3Config",
    "SamplingConfig",
    "SpeculationConfig",
]


class BudgetConfig(Settings):
    """What a job may spend, all its runs together; it stops before it spends more."""

    dollars: float | None = Field(
        default=None, gt=0, description="money in the price table's currency"
    )
    hours: float | None = Field(default=None, gt=0, description="hours of running")


class JobConfig(Settings):
    """One job: everything in a job file, with defaults filled in."""

    name: str = Field(default="job", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    input: InputConfig
    output: PlainString = Field(min_length=1, description="folder, local or s3://")
    s3: S3Config = Field(default_factory=S3Config)
    models: ModelsConfig
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    speculation: SpeculationConfig = Field(default_factory=SpeculationConfig)
    actors: ActorsConfig = Field(default_factory=ActorsConfig)
    unit_rows: int = Field(default=256, ge=1, description="rows committed together, about")
    budget: BudgetConfig | None = Field(default=None, description="null: none")
    prices: Prices | None = Field(
        default=None, description="a price table, or the file that holds it; null: the packaged one"
    )

    @model_validator(mode="after")
    def _draft_if_speculating(self) -> JobConfig:
        if self.models.draft is None and self.speculation.policy != "none":
            raise ValueError(
                f"speculation.policy {self.speculation.policy} needs models.draft; "
                "give a draft, or set speculation.policy to none"
            )
        return self

    @property
    def units_in_flight(self) -> int:
        """Units that an actor holds at once: at least one more than its slots work on.

        It is the same for all groups: what the one with the most slots needs.
        """
        return max(
            group.units_in_flight or 2 + -(-group.slots // self.unit_rows)
            for group in self.actors.pools.values()
        )

    def in_group(self, name: str) -> JobConfig:
        """The job as an actor of this group sees it: `actors` are the group's settings."""
        return self.model_copy(update={"actors": self.actors.pools[name]})
