"""Stop policies by the names that a job file uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specdec.policies.base import StopPolicy
from specdec.policies.costs import CostModel
from specdec.policies.estimating import Confidence, Entropy, HeadPolicy
from specdec.policies.estimators import ONLINE, Estimator, HeadEstimator, online_estimator
from specdec.policies.goodput import Goodput
from specdec.policies.simple import Fixed, Heuristic

if TYPE_CHECKING:
    from specdec.policies.signals import AcceptanceHead

POLICIES = ("none", "fixed", "heuristic", "confidence", "entropy", "head", "goodput")
ESTIMATORS = (*ONLINE, "head")

THRESHOLDS = {"confidence": 0.4, "entropy": 0.4, "head": 0.7}
"""Default threshold of each policy that has one; its meaning is the policy's own."""


def make_policy(
    name: str,
    *,
    k: int = 4,
    k_min: int = 1,
    k_max: int = 20,
    threshold: float | None = None,
    estimator: str | None = None,
    head: AcceptanceHead | None = None,
    costs: CostModel | None = None,
) -> StopPolicy:
    """The policy called `name`, from the numbers of a job file's `speculation` section.

    Args:
        name: one of POLICIES.
        k: candidates of `fixed`, first length of `heuristic`.
        k_min, k_max: least and most candidates of policies that adapt.
        threshold: of `confidence`, `entropy` and `head`; by default the one in THRESHOLDS.
        estimator: what `head` and `goodput` predict acceptance with, one of ESTIMATORS; by default
            the head, if there is one.
        head: a trained acceptance head.
        costs: for `goodput`, if they are known already.

    Raises:
        ValueError: there is no such policy or estimator, or it needs a head.
    """
    if threshold is None:
        threshold = THRESHOLDS.get(name, 0.0)
    match name:
        case "none":
            return StopPolicy()
        case "fixed":
            return Fixed(k)
        case "heuristic":
            return Heuristic(k, k_min, k_max)
        case "confidence":
            return Confidence(threshold, k_max)
        case "entropy":
            return Entropy(threshold, k_max)
        case "head":
            return HeadPolicy(_estimator(estimator, head), head, threshold, k_min, k_max)
        case "goodput":
            return Goodput(_estimator(estimator, head), head, costs, k_max)
    raise ValueError(f"no stop policy {name!r}; there are {', '.join(POLICIES)}")


def _estimator(name: str | None, head: AcceptanceHead | None) -> Estimator:
    name = name or ("head" if head is not None else "confidence")
    if name == "head":
        if head is None:
            raise ValueError("the estimator head needs a trained head")
        return HeadEstimator()
    if name not in ONLINE:
        raise ValueError(f"no estimator {name!r}; there are {', '.join(ESTIMATORS)}")
    return online_estimator(name)
