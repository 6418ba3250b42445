"""Is another draft or head surely better? On rows that neither has learned from.

Twice: in the simulator, where both speculate along the same texts on the same virtual clock, which
leaves only the texts to chance; and on this machine, where each generates and control rounds tell
how much faster it was than no speculation. The simulator's lower bound decides; the control rounds
may object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from operator import mul
from typing import Any

from pipeline.config.job import JobConfig
from pipeline.texts import Texts
from specdec.engine.admission import Pair
from specdec.engine.engine import Engine
from specdec.measure.speedup import Speedup
from specdec.policies.base import StopPolicy
from specdec.policies.costs import CostModel
from specdec.policies.registry import make_policy
from specdec.simulate.record import measure_costs, record
from specdec.simulate.replay import (
    Ratio,
    Replay,
    acceptance,
    acceptance_by_position,
    faster,
    replay,
)
from specdec.simulate.transcripts import Text, Transcript
from specdec.training.evaluate import JUDGED

_COST_SECONDS = 15.0
"""Spent on measuring the costs of each side, about. More is surer, and delays the night's end."""


@dataclass(frozen=True)
class Side:
    """A pair and a head, as a job would run them.

    Attributes:
        name: for people.
        pair: both models.
        head: acceptance head, or None.
    """

    name: str
    pair: Pair
    head: Any

    def policy(self, job: JobConfig) -> StopPolicy:
        """A new policy, as an actor would make it."""
        ours = job.speculation
        return make_policy(ours.policy, head=self.head, **ours.settings)


@dataclass(frozen=True)
class Comparison:
    """What was found, and what follows.

    Attributes:
        rows, live: held-out rows, and how many ran side by side.
        simulated: candidate's tokens per second over the incumbent's.
        acceptance: share of candidates accepted, incumbent's and candidate's.
        lengths: tokens of a round with JUDGED candidates, the target's own included, of both.
        speedups: by control rounds, incumbent's and candidate's; None: too few of them.
        measured: the ratio of these; None if one is not known.
        adopted: whether the candidate is surely better.
        why: in a sentence or two.
    """

    rows: int
    live: int
    simulated: Ratio
    acceptance: tuple[float, float]
    lengths: tuple[float, float]
    speedups: tuple[Speedup | None, Speedup | None]
    measured: Ratio | None
    adopted: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare(
    incumbent: Side,
    candidate: Side,
    texts: Sequence[Text],
    job: JobConfig,
    *,
    least_gain: float = 0.0,
    control_share: float = 0.25,
    costs: tuple[CostModel, CostModel] | None = None,
) -> Comparison:
    """Compare two sides.

    Args:
        incumbent, candidate: of one target.
        texts: what the target wrote, held out from both.
        job: policy, verification and slots.
        least_gain: the lower bound must exceed 1 by more.
        control_share: share of control rounds when both sides run; 0: they do not run.
        costs: what forwards of each side cost; None: measured here.
    """
    live = min(job.actors.slots, len(texts))
    sides = (incumbent, candidate)
    traces = [_traces(side, texts, job) for side in sides]
    clocks = costs or _clocks(incumbent, candidate, traces[0], job)
    replays = [
        _replay(side, found, clock, job, live)
        for side, found, clock in zip(sides, traces, clocks, strict=True)
    ]
    simulated = faster(replays[0], replays[1])
    speedups = (None, None)
    if control_share:
        speedups = tuple(_run(side, texts, job, control_share) for side in sides)  # type: ignore[assignment]
    measured = _ratio(*speedups)
    adopted, why = verdict(simulated, measured, speedups, len(texts), live, least_gain)
    before, after = (accepted_length(found) for found in traces)
    return Comparison(
        rows=len(texts),
        live=live,
        simulated=simulated,
        acceptance=(acceptance(traces[0]).value, acceptance(traces[1]).value),
        lengths=(before, after),
        speedups=speedups,
        measured=measured,
        adopted=adopted,
        why=f"A round of {JUDGED} candidates brings {after:.2f} tokens, with the incumbent "
        f"{before:.2f}. {why}",
    )


def accepted_length(traces: Sequence[Transcript]) -> float:
    """Tokens of a round with JUDGED candidates, the target's own included."""
    rates = [rate.value for rate, _ in acceptance_by_position(traces, JUDGED)]
    return float(1 + sum(accumulate(rates, mul)))


def verdict(
    simulated: Ratio,
    measured: Ratio | None,
    speedups: tuple[Speedup | None, Speedup | None],
    rows: int,
    live: int,
    least_gain: float,
) -> tuple[bool, str]:
    """Whether the candidate is adopted, and why."""
    found = (
        f"In the simulator, on {rows} held-out rows with {live} live, it is "
        f"{_shown(simulated)} times as fast as the incumbent"
    )
    least = 1 + least_gain
    better = simulated.low > least
    found += f"; the lower bound is {'' if better else 'not '}above {least:g}. "
    if measured is None:
        found += "Control rounds were too few to say more."
        return better, found
    before, after = (f"{s.value:.3f}" for s in speedups if s is not None)
    found += f"By control rounds its speedup is {after}, the incumbent's {before}"
    found += f" (ratio {_shown(measured)})"
    objects = measured.high < 1
    if objects:
        return False, f"{found}: it is slower here, so it is not adopted."
    return better, f"{found}, which does not speak against it."


def _shown(ratio: Ratio) -> str:
    return f"{ratio.value:.3f} (95% interval {ratio.low:.3f} to {ratio.high:.3f})"


def _traces(side: Side, texts: Sequence[Text], job: JobConfig) -> list[Transcript]:
    verification = job.speculation.verification
    most = max(job.speculation.k_max, job.speculation.k, JUDGED)
    return list(record(side.pair, texts, verification=verification, head=side.head, most=most))


def _clocks(
    incumbent: Side, candidate: Side, traces: Sequence[Transcript], job: JobConfig
) -> tuple[CostModel, CostModel]:
    """What forwards cost. The target's are the same on both sides, so they are measured once."""
    prompt = sum(trace.prompt_tokens for trace in traces) // len(traces)
    first = measure_costs(incumbent.pair, job.actors.slots, prompt, _COST_SECONDS)
    if candidate.pair is incumbent.pair:
        return first, first
    second = measure_costs(candidate.pair, job.actors.slots, prompt, _COST_SECONDS)
    return first, CostModel(second.draft, first.verify)


def _replay(
    side: Side, traces: Sequence[Transcript], costs: CostModel, job: JobConfig, live: int
) -> Replay:
    """What the policy does once it has learned from these rows."""
    policy = side.policy(job)
    assert side.pair.draft is not None, "both sides have a draft"
    policy.prepare(side.pair.target, side.pair.draft, live)
    replay(traces, policy, costs, live)
    return replay(traces, policy, costs, live, steady=live > 1)


def _run(side: Side, texts: Sequence[Text], job: JobConfig, share: float) -> Speedup | None:
    """Generate the held-out rows; control rounds tell the speedup."""
    memory = job.actors.kv_memory_gb
    tokenizer = getattr(side.pair, "tokenizer", None)
    engine = Engine(
        side.pair,
        policy=side.policy(job),
        verification=job.speculation.verification,
        slots=job.actors.slots,
        kv_memory_bytes=int(memory * 1e9) if memory else None,
        decode=Texts(tokenizer).decode if tokenizer is not None else None,
        control_share=share,
        lookup=job.speculation.lookup,
    )
    engine.generate([text.request for text in texts])
    return engine.stats.speedup.estimate()


def _ratio(before: Speedup | None, after: Speedup | None) -> Ratio | None:
    """The ratio of two independent measurements; errors add up as those of logarithms."""
    if before is None or after is None:
        return None
    value = after.value / before.value
    spread = math.hypot(*(math.log(s.high / s.low) / 2 for s in (before, after)))
    return Ratio(value, value * math.exp(-spread), value * math.exp(spread))
