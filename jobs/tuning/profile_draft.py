"""What a draft would do along texts of its target: measured acceptance, costs, and policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.terminal.display import Show
from pipeline.config.job import JobConfig
from pipeline.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from specdec.loading.pair import ModelPair
    from specdec.policies.base import StopPolicy
    from specdec.policies.costs import CostModel, CostTable
    from specdec.simulate.transcripts import Text, Transcript

FIXED = range(1, 9)
"""Candidates per round of the policy `fixed` that are tried; each costs a replay per live batch."""

COST_SECONDS = 20.0
"""Seconds spent on measuring what forwards cost, about. More makes the predictions steadier."""

_LEAST_ROWS = 5
"""Rows of a class below which its acceptance rate is given no interval."""


def batches_of(slots: int) -> list[int]:
    """Live batches that are tried: 1, 2, 4, ... and the job's own slots."""
    return [*(1 << i for i in range(slots.bit_length()) if 1 << i < slots), slots]


def mean_prompt(texts: Sequence[Text]) -> int:
    """Tokens of a typical prompt."""
    return sum(len(text.request.prompt_ids) for text in texts) // len(texts)


def profile_draft(
    job: JobConfig,
    pair: ModelPair,
    head: Any,
    texts: Sequence[Text],
    show: Show,
    verify: CostTable | None = None,
) -> tuple[dict[str, Any], CostModel]:
    """Record a draft along texts, measure forwards, and replay every policy.

    Args:
        job: its verification, policy and slots.
        pair: with the draft.
        head: the draft's acceptance head, if it has one.
        texts: the target's.
        show: told what is being done.
        verify: what verifications cost, if that is known; None: it is measured, too.

    Returns:
        Plain data, and what forwards cost.

    Raises:
        UserError: there is nothing to speculate on.
    """
    from specdec.policies.costs import CostModel
    from specdec.simulate.record import measure_costs, record
    from specdec.simulate.replay import acceptance_by_position

    traces = []
    mode = job.speculation.verification
    show("recording acceptance")
    for trace in record(pair, texts, verification=mode, head=head, most=_most(job)):
        traces.append(trace)
        show("recording acceptance", len(traces) / len(texts))
    if not any(len(trace.accepted) > trace.first for trace in traces):
        raise UserError(
            "the rows tried have outputs of one token: there is nothing to speculate on"
        )
    show("measuring costs")
    costs = measure_costs(pair, job.actors.slots, mean_prompt(texts), COST_SECONDS)
    if verify is not None:
        costs = CostModel(costs.draft, verify)
    show("replaying policies")
    predictions, batches = [], batches_of(job.actors.slots)
    for live in batches:
        policies = _policies(job, pair, live, head)
        predictions.append(_predict(traces, policies, costs, live))
        show("replaying policies", len(predictions) / len(batches), f"at {live} live rows")
    return {
        "rows": len(traces),
        "output_tokens": sum(len(text.output_ids) for text in texts),
        "models": pair.describe(),
        "verification": mode,
        "acceptance_by_position": [
            {"position": i, "rate": rate.value, "low": rate.low, "high": rate.high, "met": met}
            for i, (rate, met) in enumerate(acceptance_by_position(traces), start=1)
        ],
        "acceptance_by_class": _by_class(traces),
        "costs": costs.points(),
        "predictions": predictions,
    }, costs


def _by_class(traces: list[Transcript]) -> list[dict[str, Any]]:
    """How often candidates are accepted at any position, by class, the largest class first."""
    from specdec.simulate.replay import acceptance

    classes: dict[str, list[Transcript]] = {}
    for trace in traces:
        classes.setdefault(trace.group, []).append(trace)
    result = []
    for name, members in sorted(classes.items(), key=lambda item: (-len(item[1]), item[0])):
        rate = acceptance(members)
        result.append(
            {
                "class": name,
                "rows": len(members),
                "positions": sum(len(trace.accepted) for trace in members),
                "rate": rate.value,
                "low": rate.low if len(members) >= _LEAST_ROWS else None,
                "high": rate.high if len(members) >= _LEAST_ROWS else None,
            }
        )
    return result


def _most(job: JobConfig) -> int:
    most: int = max(job.speculation.k_max, *FIXED)
    return most


def _policies(job: JobConfig, pair: ModelPair, live: int, head: Any) -> dict[str, StopPolicy]:
    """What is tried, by the names of reports; prepared as an Engine would prepare it."""
    from specdec.policies.registry import POLICIES, make_policy

    ours = job.speculation
    settings: dict[str, Any] = {
        "k": ours.k,
        "k_min": ours.k_min,
        "k_max": ours.k_max,
        "estimator": ours.estimator if head or ours.estimator != "head" else None,
    }
    policies: dict[str, StopPolicy] = {}
    for name, policy in POLICIES.items():
        own = name == ours.policy
        if policy.looks_up and not policy.drafts:
            continue  # a recording of the draft says nothing of it
        if name == "fixed":
            policies |= {f"fixed {k}": make_policy(name, k=k) for k in FIXED}
        elif own or head or not policy.needs_head:
            # A threshold means something to the job's own policy only.
            threshold = ours.threshold if own else None
            policies[name] = make_policy(name, head=head, threshold=threshold, **settings)
    assert pair.draft is not None, "a profile loads the draft"
    for made in policies.values():
        made.prepare(pair.target, pair.draft, live)
    return policies


def _predict(
    traces: list[Transcript], policies: dict[str, StopPolicy], costs: CostModel, live: int
) -> dict[str, Any]:
    """Every policy at one live batch, as it does once it has learned from these rows."""
    from specdec.simulate.bound import least_seconds
    from specdec.simulate.replay import Replay, faster, replay

    results: dict[str, Replay] = {}
    for name, policy in policies.items():
        replay(traces, policy, costs, live)
        results[name] = replay(traces, policy, costs, live, steady=live > 1)
    none = results["none"]
    speeds = {name: result.tokens_per_second for name, result in results.items()}
    speedup = {name: speed / speeds["none"] for name, speed in speeds.items()}
    tokens = sum(max(len(trace.accepted) - trace.first, 0) for trace in traces)
    interval = faster(none, results["goodput"])
    return {
        "live": live,
        "none_tokens_per_second": speeds["none"],
        "speedup": speedup,
        "best_fixed": max((f"fixed {k}" for k in FIXED), key=lambda name: speedup[name]),
        "goodput_interval": [interval.low, interval.high],
        "bound": tokens / float(least_seconds(traces, costs, live).sum()) / speeds["none"],
    }
