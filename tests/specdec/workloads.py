"""Requests to run, every stop policy to run them with, and rounds as a policy sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from specdec.measure.calibration import Array, Flags
from specdec.policies.base import DraftStep, RoundOutcome, RoundStart, Signal, StopPolicy
from specdec.policies.chains import Chain
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.estimators import online_estimator
from specdec.policies.goodput import Goodput
from specdec.policies.memory import RowMemory
from specdec.policies.registry import POLICIES as REGISTERED
from specdec.policies.registry import make_policy
from specdec.policies.signals import AcceptanceHead
from specdec.request import Completion, Request, SamplingParams
from tests.specdec.tiny_models import DEVICE, VOCAB

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=24)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=20, seed=100)
Prompt = tuple[int, ...]


def prompts(lengths: Sequence[int], seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(VOCAB, (n,), generator=generator).tolist()) for n in lengths]


SOME = prompts((4, 100, 30, 1, 66, 12, 25, 7, 50, 19, 2, 33), seed=5)


def requests_of(many: Sequence[Prompt], sampling: SamplingParams) -> list[Request]:
    """One request a prompt, each with a seed of its own."""
    return [
        Request(f"r{i}", prompt, replace(sampling, seed=sampling.seed + i))
        for i, prompt in enumerate(many)
    ]


def sampled_and_greedy(many: Sequence[Prompt]) -> list[Request]:
    """One request a prompt, sampled and greedy ones by turns."""
    both = zip(requests_of(many, SAMPLED), requests_of(many, GREEDY), strict=True)
    return [pair[i % 2] for i, pair in enumerate(both)]


def outputs(completions: Sequence[Completion]) -> list[Prompt]:
    assert all(each.error is None for each in completions)
    return [each.output_ids for each in completions]


# ------------------------------------------------------------------------- rounds by hand


def round_start(
    rows: Sequence[RowMemory],
    *,
    room: int = 99,
    free_trimming: bool = True,
    contexts: Sequence[int] | None = None,
    pending: int = 1,
    beside: bool = False,
) -> RoundStart:
    """A round in which all rows decode."""
    n = len(rows)
    return RoundStart(
        rows=rows,
        room=[room] * n,
        decoding=[True] * n,
        contexts=contexts or [100] * n,
        draft_pending=[pending] * n,
        target_tokens=n,
        free_trimming=free_trimming,
        beside=beside,
    )


def memories(n: int) -> list[RowMemory]:
    return [RowMemory() for _ in range(n)]


def outcome(
    start: RoundStart,
    drafted: Sequence[int],
    accepted: Sequence[int],
    submitted: Sequence[int] | None = None,
    costs: CostModel | None = None,
) -> RoundOutcome:
    """What became of a round whose forwards took what `costs` say, by default nothing at all."""
    submitted = drafted if submitted is None else submitted
    steps = [sum(n > depth for n in drafted) for depth in range(max(drafted, default=0))]
    tokens = start.target_tokens + sum(submitted)
    return RoundOutcome(
        start,
        drafted,
        submitted,
        accepted,
        [(n, float(costs.draft(n)) if costs else 0.0) for n in steps],
        (tokens, float(costs.verify(tokens)) if costs else 0.0),
    )


def draft_step(
    rows: Sequence[int], depth: int, columns: Mapping[Signal, Sequence[float] | Array]
) -> DraftStep:
    """What a policy sees of one draft step: these columns, the others 0."""
    signals = np.zeros((len(rows), len(Signal)))
    for column, values in columns.items():
        signals[:, column] = values
    return DraftStep(np.array(rows), depth, signals)


# --------------------------------------------------------------------------- stop policies


@dataclass
class Scripted(StopPolicy):
    """Budgets and submissions from a script that looks at no token; `go_on` may look at them."""

    budgets: Sequence[int] = (0, 4)
    submissions: Sequence[int] = (99,)
    unlikely_stop: bool = False
    turn: int = 0

    def __post_init__(self) -> None:
        if self.unlikely_stop:
            self.wanted = frozenset({Signal.LOG_Q})

    def budget(self, start: RoundStart) -> list[int]:
        self.turn += 1
        return [self.budgets[(self.turn + i) % len(self.budgets)] for i in range(len(start.rows))]

    def go_on(self, step: DraftStep) -> Flags:
        likely: Flags = step.signals[:, Signal.LOG_Q] > np.log(0.5)
        return likely

    def submit(self, drafted: Sequence[int]) -> Sequence[int]:
        script = self.submissions
        return [min(n, script[(self.turn + i) % len(script)]) for i, n in enumerate(drafted)]


class Leading(Scripted):
    """Takes as many of what was looked up as a script says, and draws by the other ones."""

    looks_up = True
    leads: Sequence[int] = (0, 2, 99, 1)

    def choose(self, start: RoundStart, chains: Sequence[Chain]) -> Sequence[int]:
        script = self.leads
        return [
            min(len(chain.tokens), max(script[(self.turn + i) % len(script)], chain.forced))
            for i, chain in enumerate(chains)
        ]


class Known:
    """An estimator that finds the probabilities in the head's columns."""

    wanted = frozenset({Signal.HEAD_BEFORE, Signal.HEAD_AFTER})

    def __init__(self) -> None:
        self.seen: list[tuple[Array, Array, Flags]] = []

    def predict(self, signals: Array, typical: Array) -> tuple[Array, Array]:
        return signals[:, Signal.HEAD_BEFORE], signals[:, Signal.HEAD_AFTER]

    def learn(self, signals: Array, typical: Array, accepted: Flags) -> None:
        self.seen.append((signals, typical, accepted))


class StatedGoodput(Goodput):
    """`goodput` in a world where every forward takes exactly what its cost model says.

    Tiny models cost the same as draft and as target, so that speculation would never pay; and what
    a policy does must not depend on how busy the machine is that runs the tests.
    """

    def lookups_took(self, seconds: float) -> None:
        super().lookups_took(0.0)

    def observe(self, outcome: RoundOutcome) -> None:
        super().observe(stated(outcome, self.costs))


def stated(outcome: RoundOutcome, costs: CostModel | None) -> RoundOutcome:
    """A round whose forwards took what the costs say."""
    assert costs is not None
    tokens = outcome.verify_cost[0]
    return replace(
        outcome,
        draft_costs=[(n, float(costs.draft(n))) for n, _ in outcome.draft_costs],
        verify_cost=(tokens, float(costs.verify(tokens))),
    )


def staircase(step: int, rise: float, most: int = 4096) -> CostTable:
    """1 second up to `step` tokens, and `rise` more for each further `step` tokens begun."""
    tokens = [n for edge in range(0, most, step) for n in (edge + 1, edge + step)]
    return CostTable(tokens, [1 + rise * ((n - 1) // step) for n in tokens])


def linear(fixed: float, each: float, most: int = 4096) -> CostTable:
    """Seconds of a forward with a fixed part and a part per token."""
    return CostTable([1, most], [fixed + each, fixed + most * each])


def trimming_costs() -> CostModel:
    """A draft that costs next to nothing and a verification whose tokens do cost: trim often."""
    return CostModel(linear(0.001, 0.0), staircase(8, 0.6))


def random_head(width: int, seed: int = 3) -> AcceptanceHead:
    """A head whose predictions are spread out and mean nothing."""
    head = AcceptanceHead(width, depth=2, reject_weight=2.0)
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        parameter.data.normal_(0, width**-0.5, generator=generator)
    return head.to(DEVICE).eval().requires_grad_(False)


Make = Callable[[int], StopPolicy]
"""The draft's hidden size -> a policy."""

POLICIES: dict[str, Make] = {
    "none": lambda _: make_policy("none"),
    "fixed 1": lambda _: make_policy("fixed", k=1),
    "fixed 4": lambda _: make_policy("fixed", k=4),
    "fixed 8": lambda _: make_policy("fixed", k=8),
    "heuristic": lambda _: make_policy("heuristic", k=2),
    "confidence": lambda _: make_policy("confidence", threshold=0.5, k_max=6),
    "entropy": lambda _: make_policy("entropy", k_max=6),
    "head": lambda width: make_policy("head", head=random_head(width), threshold=0.9, k_max=8),
    "head online": lambda _: make_policy("head", estimator="entropy", threshold=0.6, k_max=8),
    "suffix": lambda _: make_policy("suffix", threshold=0.02, k_max=6),
    "goodput": lambda _: make_policy("goodput"),
    "goodput stated": lambda _: stated_goodput(),
    "goodput head": lambda width: stated_goodput(random_head(width)),
    "scripted": lambda _: Leading((0, 3, 1, 5), (9, 1, 0, 4), unlikely_stop=True),
}
"""All policies that there are, some of them several times; `stated` ones do speculate.

A policy that is not among these is run with its own settings.
"""

POLICIES |= {
    name: lambda _, name=name: make_policy(name)
    for name in REGISTERED
    if name not in {each.split()[0] for each in POLICIES}
}

SPECULATING = [name for name in POLICIES if name not in ("none", "goodput")]
DRAFTING = [name for name in SPECULATING if name != "suffix"]
"""Those that ask a draft."""


def stated_goodput(head: AcceptanceHead | None = None) -> StatedGoodput:
    made = make_policy("goodput", head=head, costs=trimming_costs(), k_max=8)
    assert isinstance(made, Goodput)
    return StatedGoodput(made.estimator, made.head, made.costs, made.k_max)


def looking_goodput() -> StatedGoodput:
    """goodput as it is without a draft, at costs that make it trim."""
    return StatedGoodput(online_estimator("confidence"), None, trimming_costs(), k_max=8)


LOOKING_UP: dict[str, Callable[[], StopPolicy]] = {
    "suffix": lambda: make("suffix"),
    "goodput": looking_goodput,
}
"""The policies that look candidates up where there is no draft."""


def make(name: str, width: int = 64) -> StopPolicy:
    """The policy called `name` for a draft of that hidden size."""
    return POLICIES[name](width)
