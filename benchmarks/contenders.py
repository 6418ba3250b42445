"""The policies that `simulate.py` replays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

from specdec.policies.base import StopPolicy
from specdec.policies.costs import CostModel
from specdec.policies.registry import make_policy

Make = Callable[[], StopPolicy]


@dataclass(frozen=True)
class Contender:
    """A policy, and where its candidates come from.

    Attributes:
        make: makes it as it begins.
        draft: whether there is a draft.
        lookup: whether it may look candidates up.
    """

    make: Make
    draft: bool = True
    lookup: bool = False


def contenders(trained: bool, width: int, make: Callable[[], CostModel]) -> dict[str, Contender]:
    """Every policy that drafts, by name; trees where the traces know `width` choices at a place."""
    # Weights are not needed: what a head says of each candidate is in the traces.
    head: Any = object() if trained else None
    named: dict[str, Make] = {"none": lambda: make_policy("none")}
    for k in range(1, 15):
        named[f"fixed {k}"] = lambda k=k: make_policy("fixed", k=k)
    for k, w in product(range(2, 11), range(2, width + 1)):
        named[f"tree {k}x{w}"] = lambda k=k, w=w: make_policy("fixed", k=k, width=w)
    named["heuristic"] = lambda: make_policy("heuristic")
    for t in (0.2, 0.4, 0.6):
        named[f"confidence {t}"] = lambda t=t: make_policy("confidence", threshold=t)
        named[f"entropy {t}"] = lambda t=t: make_policy("entropy", threshold=t)
    for h in (0.1, 0.3, 0.5, 0.7, 0.9):
        for estimator in ("confidence", *(["head"] if trained else [])):
            name = "head" if estimator == "head" else "threshold"
            named[f"{name} {h}"] = lambda h=h, e=estimator: make_policy(
                "head", k_min=1, threshold=h, estimator=e, head=head
            )
    for estimator in ("confidence", "entropy", *(["head"] if trained else [])):
        for w in sorted({1, width}):
            trees = ", trees" * (w > 1)
            named[f"goodput, {estimator}{trees}"] = lambda e=estimator, w=w: make_policy(
                "goodput", estimator=e, head=head, costs=make(), width=w
            )
    return {name: Contender(build) for name, build in named.items()}


def looking(make: Callable[[], CostModel], live: int) -> dict[str, Contender]:
    """The policies that look candidates up, by name."""

    def undrafted() -> StopPolicy:
        policy, nothing = make_policy("goodput", costs=make()), cast(Any, None)
        policy.prepare(nothing, None, live)  # costs are known: it looks at no model
        return policy

    both = Contender(lambda: make_policy("goodput", costs=make()), lookup=True)
    return {
        "suffix": Contender(lambda: make_policy("suffix"), draft=False, lookup=True),
        "goodput, no draft": Contender(undrafted, draft=False, lookup=True),
        "goodput, look-ups": both,
    }
