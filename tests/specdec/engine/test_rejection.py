"""Under `rejection`, output has the target's distribution; breaking the invariant is noticed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.measure.calibration import Flags
from specdec.measure.clock import PhaseClock
from specdec.policies.base import DraftStep, RoundStart, Signal, StopPolicy
from specdec.policies.costs import CostModel
from specdec.policies.estimating import _Judgement
from specdec.policies.estimators import online_estimator
from specdec.policies.goodput import Goodput
from specdec.policies.kinds import Kind
from specdec.policies.simple import Fixed
from specdec.request import Counts, Request, SamplingParams
from tests.specdec.goodness import chi_square_excess, counted, reference_distribution
from tests.specdec.tiny_models import TinyPair, make_pair, noisy_copy, tiny_model
from tests.specdec.workloads import (
    DRAFTING,
    GREEDY,
    LOOKING_UP,
    POLICIES,
    SAMPLED,
    SOME,
    SPECULATING,
    Prompt,
    Scripted,
    StatedGoodput,
    linear,
    make,
    outputs,
    requests_of,
    sampled_and_greedy,
)

TINY_VOCAB, TINY_HIDDEN = 5, 16


@pytest.fixture(scope="module")
def tiny_pair() -> TinyPair:
    shape = {"vocab": TINY_VOCAB, "hidden": TINY_HIDDEN, "layers": 1, "heads": 2, "kv_heads": 1}
    model = tiny_model(**shape, peak=60.0, seed=4)  # type: ignore[arg-type]
    return make_pair(model, noisy_copy(model, 0.4))


@torch.inference_mode()
def first_three(model: PreTrainedModel, prompt: Prompt, params: SamplingParams) -> Tensor:
    """float64 [V, V, V]: exact joint distribution of the first three output tokens."""
    vocab = torch.arange(TINY_VOCAB)
    joint = torch.ones(1, dtype=torch.float64)
    texts = torch.tensor([prompt])
    for _ in range(3):
        p = reference_distribution(model(texts, use_cache=False).logits[:, -1], params)
        joint = (joint[:, None] * p).flatten()
        texts = torch.cat(
            [texts.repeat_interleave(TINY_VOCAB, 0), vocab.repeat(len(texts))[:, None]], 1
        )
    return joint.view([TINY_VOCAB] * 3)


def excess_of(
    pair: TinyPair,
    policy: StopPolicy,
    sampling: SamplingParams,
    mode: str,
    many: int,
    made_to_speculate: bool = False,
    clock: PhaseClock | None = None,
    lookup: bool = True,
) -> float:
    """Chi-square of the first three output tokens of `many` requests with one prompt."""
    prompt = (0, 3, 1, 2)
    options: Any = {"verification": mode, "slots": 256, "clock": clock, "lookup": lookup}
    engine = Engine(pair, policy=policy, **options)
    done = engine.generate(requests_of([prompt] * many, replace(sampling, max_new_tokens=4)))
    tokens = torch.tensor(outputs(done))[:, :3]
    counts = engine.stats.counts
    if made_to_speculate:
        assert 0 < counts.accepted < counts.verified
    if isinstance(policy, StatedGoodput) and not lookup:
        assert counts.verified < counts.drafted
    expected = first_three(pair.plain, prompt, sampling)
    return chi_square_excess(counted(tokens, TINY_VOCAB), expected)


COUPLED = ["fixed 4", "heuristic", "goodput stated", "scripted"]
ACROSS = [
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=4),
    SamplingParams(temperature=1.3, top_p=0.85),
    SamplingParams(temperature=1.0, min_p=0.1),
]


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("policy", "sampling", "mode"),
    [
        *((name, ACROSS[i % 4], "rejection") for i, name in enumerate(POLICIES)),
        # Tests of equality above say more about `coupled`, but not that its noise is unbiased.
        *((name, ACROSS[i], "coupled") for i, name in enumerate(COUPLED)),
    ],
)
def test_the_engines_outputs_have_the_targets_distribution(
    tiny_pair: TinyPair, policy: str, sampling: SamplingParams, mode: str
) -> None:
    """Chi-square of three tokens jointly, 125 cells, 4,000 requests; false alarm 1e-6."""
    made = make(policy, TINY_HIDDEN)
    assert excess_of(tiny_pair, made, sampling, mode, 4_000, policy in SPECULATING) < 1


class Beside(PhaseClock):
    """As beside a GPU: draft steps run ahead, and the policy learns late."""

    asynchronous = True


@pytest.mark.statistical
@pytest.mark.parametrize("looks", [True, False])
def test_outputs_beside_a_device_have_the_targets_distribution(
    tiny_pair: TinyPair, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether `goodput` looks at candidates or not; as above, false alarm 1e-6."""
    policy = Goodput(
        online_estimator("confidence"),
        None,
        costs=CostModel(linear(1e-3, 0.0), linear(1.0, 1e-3)),
        k_max=3,
    )
    monkeypatch.setattr(policy.kinds, "choose", lambda *_: Kind(looks=looks))
    clock = Beside(torch.device("cpu"))
    assert excess_of(tiny_pair, policy, SamplingParams(), "rejection", 4_000, True, clock) < 1


@pytest.mark.statistical
@pytest.mark.parametrize("policy", LOOKING_UP)
def test_candidates_that_are_looked_up_keep_the_targets_distribution(
    tiny_pair: TinyPair, policy: str
) -> None:
    """As above; each row looks up what all others wrote of the same prompt."""
    lone = replace(tiny_pair, draft=None)
    made = LOOKING_UP[policy]()
    assert excess_of(lone, made, SamplingParams(), "rejection", 4_000) < 1
    assert made.explain(0).reason


@dataclass
class PeekingTrim(StopPolicy):
    """Breaks the invariant of rejection sampling: it submits a candidate only if it likes it."""

    liked: list[bool] = field(default_factory=list)
    wanted = frozenset({Signal.LOG_Q})

    def budget(self, start: RoundStart) -> list[int]:
        self.liked = [True] * len(start.rows)
        return [2] * len(start.rows)

    def go_on(self, step: DraftStep) -> Flags:
        likely = np.exp(step.signals[:, Signal.LOG_Q]) > 0.4
        for row, liked in zip(step.rows, likely.tolist(), strict=True):
            self.liked[row] = liked
        return np.zeros_like(likely)

    def submit(self, drafted: Sequence[int]) -> Sequence[int]:
        return [n * liked for n, liked in zip(drafted, self.liked, strict=True)]


@pytest.mark.statistical
def test_a_policy_that_trims_by_the_candidates_own_score_is_noticed(tiny_pair: TinyPair) -> None:
    """The same test as above must fail on a policy that breaks the invariant, and only there."""
    assert excess_of(tiny_pair, PeekingTrim(), SamplingParams(), "rejection", 6_000) > 1
    assert excess_of(tiny_pair, PeekingTrim(), SamplingParams(), "coupled", 6_000) < 1


class TrimsByWhatWasDrawn(StatedGoodput):
    """goodput with a bug: it decides whether y_k is submitted by the estimate that knows y_k.

    The estimate of `before` sees y_1..y_{k-1} and the draft's distributions, the row's own and
    those of its neighbours. Neighbours may be looked at, and are, since all rows compete for the
    same steps of the staircase: every row draws with a seed of its own, so that y_k has the law q
    whatever the neighbours drew. Given all that the trimming looks at, y_k ~ q still holds, and
    that is what the proof of rejection sampling needs.
    """

    def _judge(self, step: DraftStep) -> _Judgement:
        judged = super()._judge(step)
        return replace(judged, before=judged.after)


def trimming_goodput(kind: type[StatedGoodput]) -> StatedGoodput:
    """With 256 rows a token of verification costs half of what a committed one is worth."""
    costs = CostModel(linear(1e-6, 0.0), linear(256.0, 1.0))
    return kind(online_estimator("confidence"), None, costs, k_max=3)


@pytest.mark.statistical
@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("kind", [StatedGoodput, TrimsByWhatWasDrawn])
def test_goodput_may_trim_by_what_it_knew_before_the_draw_and_by_that_alone(
    tiny_pair: TinyPair, kind: type[StatedGoodput], mode: str
) -> None:
    """The bug is noticed under rejection sampling and harms nowhere else.

    Chi-square as above, 6,000 requests: the legal policy fails with probability 1e-6.
    """
    policy = trimming_goodput(kind)
    excess = excess_of(tiny_pair, policy, SamplingParams(), mode, 6_000, lookup=False)
    if kind is TrimsByWhatWasDrawn and mode == "rejection":
        assert excess > 1
    else:
        assert excess < 1


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("policy", [*DRAFTING, "alternating"])
def test_a_draft_that_is_the_target_has_everything_accepted(
    self_pair: TinyPair, policy: str, mode: str
) -> None:
    """Also after rounds without candidates, in which the draft's cache falls behind."""
    chosen = Scripted((0, 4, 0, 0, 2)) if policy == "alternating" else make(policy)
    if isinstance(chosen, Goodput):
        chosen.width = 1  # of siblings all but one fall
    options: dict[str, Any] = {"verification": mode, "slots": 5, "lookup": False}
    engine = Engine(self_pair, policy=chosen, **options)
    done = engine.generate(sampled_and_greedy(SOME))
    for completion in done:
        assert completion.counts.verified == completion.counts.accepted
    assert engine.stats.counts.acceptance_rate == 1.0


def test_block_efficiency_of_full_acceptance_is_k_plus_one(self_pair: TinyPair) -> None:
    engine = Engine(self_pair, policy=Fixed(4), verification="coupled")
    (done,) = engine.generate([Request("a", SOME[0], replace(GREEDY, max_new_tokens=21))])
    # The prompt's forward yields one token, four rounds yield five each.
    assert done.counts == Counts(rounds=5, drafted=16, verified=16, accepted=16, committed=21)
    assert done.counts.block_efficiency == 21 / 5


@pytest.mark.parametrize("policy", ["fixed 4", "goodput", "head online"])
def test_rows_of_one_seed_share_numbers_only_where_no_row_learns_from_another(
    pair: TinyPair, policy: str
) -> None:
    """Many jobs give all rows one seed. What one draws may decide how far another drafts."""
    requests = [Request(str(i), SOME[2], SAMPLED) for i in range(2)]
    engine = Engine(pair, policy=make(policy), verification="rejection", lookup=False)
    one, other = outputs(engine.generate(requests))
    assert (one == other) == (policy == "fixed 4")
