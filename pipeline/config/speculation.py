"""The section `speculation` of the job file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.settings import Settings, example

Policy = Literal["none", "fixed", "heuristic", "confidence", "entropy", "head", "goodput"]
Estimator = Literal["confidence", "entropy", "head"]

THRESHOLD_POLICIES = ("confidence", "entropy", "head")
"""Those that stop at `threshold`."""

ESTIMATING_POLICIES = ("head", "goodput")
"""Those that predict acceptance, with `estimator` or `head`."""


class SpeculationConfig(Settings):
    """When to stop drafting, and how candidates are verified."""

    model_config = example({"policy": "goodput", "verification": "coupled", "trace": True})

    policy: Policy = Field(
        default="goodput",
        description="When to stop drafting. `goodput` weighs what each candidate brings and "
        "costs on this machine. `none` does not speculate.",
    )
    verification: Literal["rejection", "coupled"] = Field(
        default="rejection",
        description="`rejection` accepts the most candidates. `coupled` gives the same tokens "
        "for any draft, policy and batch.",
    )
    k: int = Field(
        default=4,
        ge=0,
        le=64,
        description="Candidates per round: of `fixed`, and the first number of `heuristic`.",
    )
    k_min: int = Field(
        default=1, ge=0, le=64, description="Least candidates per round, of `heuristic` and `head`."
    )
    k_max: int = Field(
        default=20,
        ge=1,
        le=64,
        description="Most candidates per round, of all policies but `fixed`.",
    )
    threshold: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Where to stop drafting. `confidence`: below this draft probability (`null`: "
        "0.4). `entropy`: below this bound on acceptance (0.4). `head`: above this "
        "risk of a rejection (0.7).",
    )
    head: str | None = Field(
        default=None,
        description="Folder of a trained acceptance head, made by `specbatch train-head`.",
    )
    estimator: Estimator | None = Field(
        default=None,
        description="What `head` and `goodput` predict acceptance with. `null`: the trained head "
        "if there is one, else `confidence`.",
    )
    control_share: float = Field(
        default=0.02,
        ge=0,
        le=0.5,
        description="Share of rounds without speculation, chosen at random. They measure the "
        "speedup.",
    )
    trace: bool = Field(
        default=False,
        description="Keep every round of every row in `trace/`, for `specbatch explain`.",
    )

    @model_validator(mode="after")
    def _settings_of_the_policy(self) -> SpeculationConfig:
        if self.k_min > self.k_max:
            raise ValueError(f"k_min ({self.k_min}) is more than k_max ({self.k_max})")
        if self.threshold is not None and self.policy not in THRESHOLD_POLICIES:
            names = ", ".join(THRESHOLD_POLICIES)
            raise ValueError(f"threshold belongs to the policies {names}, not to {self.policy}")
        for name in ("head", "estimator"):
            if getattr(self, name) is not None and self.policy not in ESTIMATING_POLICIES:
                names = " and ".join(ESTIMATING_POLICIES)
                raise ValueError(f"{name} belongs to the policies {names}, not to {self.policy}")
        if self.head is not None and self.estimator not in (None, "head"):
            raise ValueError(
                f"head is not used with estimator {self.estimator}; remove one of them"
            )
        needs_head = self.estimator == "head" or (self.policy == "head" and not self.estimator)
        if needs_head and self.head is None:
            raise ValueError(
                "head: give the folder of a trained head (make one with specbatch train-head), "
                "or set estimator to confidence"
            )
        return self
