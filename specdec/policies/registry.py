"""All stop policies, by the names that a job file uses.

A policy says in its own file what it is called, what it can be told, and what it does
(`StopPolicy`). Here is the one line that makes it known. Nothing here needs torch, so that a job's
configuration takes names, defaults and help from the policies themselves.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from specdec.policies.base import Head, StopPolicy
from specdec.policies.costs import CostModel
from specdec.policies.estimating import Confidence, Entropy, HeadPolicy
from specdec.policies.estimators import make_estimator
from specdec.policies.goodput import Goodput
from specdec.policies.settings import Setting
from specdec.policies.simple import Fixed, Heuristic, NoDrafting
from specdec.policies.suffix import Suffix

POLICIES: dict[str, type[StopPolicy]] = {
    policy.name: policy
    for policy in (
        NoDrafting,
        Fixed,
        Heuristic,
        Confidence,
        Entropy,
        HeadPolicy,
        Suffix,
        Goodput,
    )
}
"""The policies that there are; a new one takes a line here."""


def without_draft() -> list[str]:
    """The policies that need no draft model."""
    return [name for name, policy in POLICIES.items() if policy.looks_up or not policy.drafts]


def takers(name: str) -> dict[str, Setting]:
    """The policies that take a setting, and how each declares it."""
    return {
        policy.name: declared[name]
        for policy in POLICIES.values()
        if name in (declared := policy.settings())
    }


def meaning(setting: str) -> str:
    """What the policies say of a setting, in sentences; their defaults where these differ."""
    takes = takers(setting)
    differ = len({each.default for each in takes.values()}) > 1
    said: dict[str, list[str]] = {}
    for policy, each in takes.items():
        own = f"`{policy}` ({each.default})" if differ else f"`{policy}`"
        said.setdefault(each.meaning, []).append(own)
    sentences = (f"{own}: {', '.join(policies)}." for own, policies in said.items())
    return " ".join(each[0].upper() + each[1:] for each in sentences)


def make_policy(
    name: str,
    *,
    estimator: str | None = None,
    head: Head | None = None,
    costs: CostModel | None = None,
    **settings: float | None,
) -> StopPolicy:
    """The policy called `name`.

    One set of settings serves all policies, so that a comparison changes the name alone: what only
    others take is ignored, and None is the policy's own default.

    Args:
        name: one of POLICIES.
        estimator: what `head` and `goodput` predict acceptance with, one of ESTIMATORS; by default
            the head, if there is one.
        head: a trained acceptance head.
        costs: for `goodput`, if they are known already.
        settings: as the policies declare them: `k`, `k_min`, `k_max`, `threshold`.

    Raises:
        ValueError: there is no such policy, setting or estimator, a setting is out of its bounds,
            or the estimator needs a head.
    """
    if name not in POLICIES:
        raise ValueError(f"no stop policy {name!r}; there are {', '.join(POLICIES)}")
    policy = POLICIES[name]
    declared = policy.settings()
    known = {key for each in POLICIES.values() for key in each.settings()}
    for key in settings:
        if key not in known:
            own = ", ".join([*declared, *(["estimator"] if policy.estimates else [])])
            raise ValueError(f"no setting {key!r} of stop policies; {name} takes {own or 'none'}")
    given: dict[str, Any] = {}
    for key, limits in declared.items():
        value = settings.get(key)
        if value is None:
            continue
        if not limits.least <= value <= limits.most:
            bounds = f"from {limits.least} to {limits.most}"
            raise ValueError(f"{key} of the policy {name} must be {bounds}, not {value}")
        given[key] = value
    if policy.estimates:
        given |= {"estimator": make_estimator(estimator, head), "head": head}
    if is_dataclass(policy) and "costs" in {each.name for each in fields(policy)}:
        given["costs"] = costs
    return policy(**given)
