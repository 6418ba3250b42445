"""The section `speculation` of the job file.

Policies declare their names, settings and bounds themselves (specdec/policies/registry.py); this
section takes them from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from pipeline.config.locations import Location, Locations
from pipeline.config.section import Section, example
from specdec.policies.base import MOST_WIDTH
from specdec.policies.estimators import ESTIMATORS
from specdec.policies.registry import POLICIES, meaning, takers

if TYPE_CHECKING:
    Policy: TypeAlias = str
    Estimator: TypeAlias = str
else:  # the registry's names: an unknown one is refused, and the schema lists them
    Policy, Estimator = Literal[(*POLICIES,)], Literal[ESTIMATORS]

_LENGTHS = ("k", "k_min", "k_max")
_LOOKING_UP = [name for name, policy in POLICIES.items() if policy.looks_up]
_ESTIMATING = [name for name, policy in POLICIES.items() if policy.estimates]


def _length(setting: str) -> Any:
    """A number of candidates that stop policies take: its bounds and default are theirs."""
    first = next(iter(takers(setting).values()))
    return Field(default=first.default, ge=first.least, le=first.most, description=meaning(setting))


def _names(policies: Sequence[str], quote: str = "") -> str:
    quoted = [f"{quote}{name}{quote}" for name in policies]
    return (" and " if len(policies) == 2 else ", ").join(quoted)


class SpeculationConfig(Section):
    """When to stop drafting, and how candidates are verified."""

    model_config = example({"policy": "goodput", "verification": "coupled", "trace": True})

    policy: Policy = Field(
        default="goodput",
        description="When to stop drafting. "
        + " ".join(f"`{name}` {policy.summary}." for name, policy in POLICIES.items()),
    )
    verification: Literal["rejection", "coupled"] = Field(
        default="rejection",
        description="`rejection` accepts the most candidates. `coupled` gives the same tokens "
        "for any draft, policy and batch.",
    )
    k: int = _length("k")
    k_min: int = _length("k_min")
    k_max: int = _length("k_max")
    width: int | None = Field(
        default=None,
        ge=1,
        le=MOST_WIDTH,
        description=f"Alternatives that candidates branch into. {meaning('width')} 1: candidates "
        "follow each other. `null`: the policy's own.",
    )
    threshold: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=f"Where to stop drafting. {meaning('threshold')} `null`: the policy's own.",
    )
    head: Location | None = Field(
        default=None,
        description="Folder of a trained acceptance head, made by `specbatch train-head`.",
    )
    estimator: Estimator | None = Field(
        default=None,
        description=f"What {_names(_ESTIMATING, '`')} predict acceptance with. `null`: the "
        "trained head if there is one, else `confidence`.",
    )
    lookup: bool | None = Field(
        default=None,
        description="Whether candidates are also looked up in what was written before: in the "
        "row's own text, in that of its prompt's other samples and in outputs of other rows. They "
        "stand in front of what a draft proposes, and a round with any has no trees. For "
        f"{_names(_LOOKING_UP, '`')}. `null`: yes, except beside a draft on a GPU, "
        "which would wait for it, unless there is a `corpus`.",
    )
    corpus: Locations = Field(
        default=(),
        description="Output folders of earlier jobs, local or `s3://`, in whose completions "
        "candidates are looked up, too. Each machine makes a file of them once.",
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

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_policy(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(name := values.get("policy"), str):
            return values
        own = POLICIES[name].settings() if name in POLICIES else {}
        differing = {
            key: each.default
            for key, each in own.items()
            if key in _LENGTHS and each.default != cls.model_fields[key].default
        }
        return {**differing, **values}

    @model_validator(mode="after")
    def _settings_of_the_policy(self) -> SpeculationConfig:
        if self.k_min > self.k_max:
            raise ValueError(f"k_min ({self.k_min}) is more than k_max ({self.k_max})")
        policy = POLICIES[self.policy]
        for name in ("width", "threshold", "head", "estimator"):
            owners = _ESTIMATING if name in ("head", "estimator") else [*takers(name)]
            if getattr(self, name) is not None and self.policy not in owners:
                kind = "policies" if len(owners) > 1 else "policy"
                raise ValueError(
                    f"{name} belongs to the {kind} {_names(owners)}, not to {self.policy}"
                )
        if self.lookup and not policy.looks_up:
            raise ValueError(
                f"lookup belongs to the policies {_names(_LOOKING_UP)}, not to {self.policy}; "
                "remove it, or set policy to goodput"
            )
        if self.corpus and not self.looks_up:
            raise ValueError(
                "corpus is for looking candidates up, which "
                + ("lookup: false forbids" if policy.looks_up else f"{self.policy} does not")
                + "; remove one of them"
            )
        if self.lookup is False and not policy.drafts:
            raise ValueError(
                f"lookup: false leaves the policy {self.policy} nothing to propose; remove it"
            )
        if self.head is not None and self.estimator not in (None, "head"):
            raise ValueError(
                f"head is not used with estimator {self.estimator}; remove one of them"
            )
        if self.needs_head and self.head is None:
            raise ValueError(
                "head: give the folder of a trained head (make one with specbatch train-head), "
                "or set estimator to confidence"
            )
        return self

    @property
    def needs_head(self) -> bool:
        """Whether the policy does not go without a trained head."""
        needs = POLICIES[self.policy].needs_head and not self.estimator
        return self.estimator == "head" or needs

    @property
    def drafts(self) -> bool:
        """Whether the policy asks a draft model for candidates, if there is one."""
        return POLICIES[self.policy].drafts

    @property
    def looks_up(self) -> bool:
        """Whether candidates may be looked up."""
        return POLICIES[self.policy].looks_up and self.lookup is not False

    @property
    def settings(self) -> dict[str, Any]:
        """What the policy takes of these, for `make_policy`; not the head, which is to be loaded.

        Their order is part of fingerprints.
        """
        policy = POLICIES[self.policy]
        own = policy.settings()
        names = [*own, *(["estimator"] if policy.estimates else [])]
        given = {name: getattr(self, name) for name in names if name in type(self).model_fields}
        # A later key than the others: a job that says nothing by it is the same job as before.
        if "width" in given and given["width"] in (None, own["width"].default):
            del given["width"]
        return given
