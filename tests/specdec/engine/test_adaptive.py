"""The engine with policies that adapt: control rounds, traces, calibration, the draft's cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from specdec.engine.engine import Engine
from specdec.policies.base import RoundOutcome, StopPolicy
from specdec.policies.costs import CostModel
from specdec.policies.estimating import EstimatingPolicy
from specdec.policies.simple import Fixed
from specdec.request import Completion
from tests.specdec.tiny_models import TinyPair
from tests.specdec.workloads import (
    DRAFTING,
    GREEDY,
    POLICIES,
    SAMPLED,
    SOME,
    SPECULATING,
    Scripted,
    StatedGoodput,
    linear,
    make,
    outputs,
    prompts,
    random_head,
    requests_of,
    stated_goodput,
)

ESTIMATING = [name for name in DRAFTING if isinstance(make(name), EstimatingPolicy)]


def run(
    pair: TinyPair,
    policy: StopPolicy,
    *,
    mode: str = "coupled",
    sampled: bool = True,
    share: float = 0.0,
    trace: bool = False,
    slots: int = 5,
    lookup: bool = True,
) -> tuple[list[Completion], Engine]:
    engine = Engine(
        pair,
        policy=policy,
        verification=mode,  # type: ignore[arg-type]
        slots=slots,
        prefill_chunk=64,
        control_share=share,
        trace=trace,
        lookup=lookup,
    )
    return engine.generate(requests_of(SOME, SAMPLED if sampled else GREEDY)), engine


@pytest.fixture(scope="module")
def with_end(pair: TinyPair) -> TinyPair:
    """Some outputs end in the middle of a round."""
    done, _ = run(pair, StopPolicy())
    return replace(pair, eos_token_ids=frozenset({done[1].output_ids[9], done[4].output_ids[13]}))


@pytest.fixture(scope="module")
def undisturbed(with_end: TinyPair) -> list[list[Completion]]:
    """The target's own: greedy, then sampled."""
    return [run(with_end, StopPolicy(), sampled=sampled)[0] for sampled in (False, True)]


# -------------------------------------------------------------------------- what is trimmed


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("with_head", [False, True], ids=["online", "head"])
def test_goodput_speculates_and_trims_where_costs_make_it(
    pair: TinyPair, with_head: bool, mode: str
) -> None:
    """With a verification that pays for every token even what is known before a draw matters."""
    policy = stated_goodput(random_head(64) if with_head else None)
    policy.costs = CostModel(linear(0.001, 0.0), linear(1.0, 0.12))
    _, engine = run(pair, policy, mode=mode, slots=8)
    counts = engine.stats.counts
    assert counts.drafted > counts.verified > counts.accepted > 0


# ------------------------------------------------------------------------------- control


def totals(engine: Engine) -> dict[str, int]:
    stats = engine.stats
    return {
        "rows": stats.counts.rounds,
        "committed": stats.counts.committed,
        "forwards": stats.draft_forwards,
        "drafted": stats.counts.drafted,
        "control": sum(int(each.n) for each in stats.speedup.control.values()),
        "speculative": sum(int(each.n) for each in stats.speedup.speculative.values()),
    }


def rounds_of(engine: Engine) -> Iterator[dict[str, int]]:
    """What each step adds to the engine's totals."""
    while engine.has_work:
        before = totals(engine)
        engine.step()
        yield {name: now - before[name] for name, now in totals(engine).items()}


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("policy", ["fixed 4", "heuristic", "goodput stated"])
def test_a_control_round_commits_one_token_a_row_and_never_drafts(
    pair: TinyPair, policy: str, mode: str
) -> None:
    engine = Engine(pair, policy=make(policy), verification=mode, control_share=0.25)  # type: ignore[arg-type]
    # Rows end one after the other, so that there are several rounds of each live batch.
    for i, request in enumerate(requests_of(prompts((5,) * 12), SAMPLED)):
        longer = replace(request.sampling, max_new_tokens=20 + 16 * i, ignore_eos=True)
        engine.submit(replace(request, sampling=longer))
    rounds = list(rounds_of(engine))
    controls = [each for each in rounds if each["control"]]
    assert len(controls) >= 2
    for each in controls:
        assert each["committed"] == each["rows"] > 0
        assert each["forwards"] == each["drafted"] == 0
    assert any(each["committed"] > each["rows"] for each in rounds if each["speculative"])
    assert engine.stats.seconds["control"] > 0
    meter = engine.stats.speedup
    assert sum(each.k for each in meter.control.values()) == sum(c["rows"] for c in controls)
    assert set(meter.control) <= set(meter.speculative)


def test_one_round_of_each_block_that_could_speculate_is_a_control_round(pair: TinyPair) -> None:
    """One row, no refills: 1 token is left for the last round, which has no room for candidates."""
    engine = Engine(pair, policy=Fixed(1), verification="coupled", control_share=0.2)
    engine.submit(requests_of([SOME[0]], replace(GREEDY, max_new_tokens=200))[0])
    rounds = list(rounds_of(engine))[1:]  # the first one feeds the prompt
    blocks = [rounds[i : i + 5] for i in range(0, len(rounds) - 5, 5)]
    assert len(blocks) > 15
    assert {sum(each["control"] for each in block) for block in blocks} == {1}
    assert len({[each["control"] for each in block].index(1) for block in blocks}) > 2


@pytest.mark.parametrize("policy", SPECULATING)
def test_no_share_no_control_rounds(pair: TinyPair, policy: str) -> None:
    _, engine = run(pair, make(policy), share=0.0)
    assert not engine.stats.speedup.control and "control" not in engine.stats.seconds
    assert engine.stats.speedup.speculative


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "greedy"])
@pytest.mark.parametrize("policy", POLICIES)
def test_control_rounds_and_tracing_change_no_token(
    with_end: TinyPair, undisturbed: list[list[Completion]], policy: str, sampled: bool
) -> None:
    plain = undisturbed[sampled]
    watched, engine = run(with_end, make(policy), sampled=sampled, share=0.3, trace=True)
    assert watched == [replace(p, counts=w.counts) for p, w in zip(plain, watched, strict=True)]
    assert outputs(watched) == outputs(plain)
    assert bool(engine.stats.speedup.control) == (policy != "none")


def test_tracing_changes_nothing_under_rejection_sampling_either(pair: TinyPair) -> None:
    plain, _ = run(pair, stated_goodput(), mode="rejection", share=0.2)
    traced, _ = run(pair, stated_goodput(), mode="rejection", share=0.2, trace=True)
    assert traced == plain and all(each.trace for each in traced)
    assert not any(each.trace for each in plain)


# --------------------------------------------------------------------------------- trace


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("policy", [*SPECULATING, "none"])
def test_a_trace_tells_what_the_counts_sum_up(with_end: TinyPair, policy: str, mode: str) -> None:
    done, _ = run(with_end, make(policy), mode=mode, share=0.1, trace=True)
    for prompt, completion in zip(SOME, done, strict=True):
        counts, trace = completion.counts, completion.trace
        tokens = [*prompt, *completion.output_ids]
        # A prompt of one token has nothing to be fed before it decodes.
        assert len(trace) == counts.rounds - (len(prompt) > 1)
        assert sum(len(each.candidates) for each in trace) == counts.drafted
        assert sum(each.submitted for each in trace) == counts.verified
        # What the end cut off the last round is in its trace alone.
        cut = sum(each.accepted for each in trace) - counts.accepted
        assert 0 <= cut <= (trace[-1].accepted if trace else 0)
        assert cut == 0 or completion.finish_reason == "stop"
        at = len(prompt) + (len(prompt) > 1)
        for each in trace:
            assert each.context == at
            assert 0 <= each.accepted <= each.submitted <= len(each.candidates)
            assert 1 <= each.live <= 5 and each.reason
            stands = tokens[at : at + each.accepted]
            assert stands == list(each.candidates[: len(stands)])
            if each.accepted < each.submitted and at + each.accepted < len(tokens):
                refused = each.candidates[each.accepted]
                assert tokens[at + each.accepted] != refused or mode == "rejection"
            if each.reason == "control round":
                assert each.candidates == each.predicted == ()
            at += each.accepted + 1
        assert at - cut - len(tokens) in (0, 1)


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("policy", ESTIMATING)
def test_a_policy_that_estimates_predicts_every_candidate(
    pair: TinyPair, policy: str, mode: str
) -> None:
    done, _ = run(pair, make(policy), mode=mode, share=0.1, trace=True)
    rounds = [each for completion in done for each in completion.trace]
    assert any(each.candidates for each in rounds)
    for each in rounds:
        assert len(each.predicted) == len(each.candidates)
        assert all(0 < p < 1 for p in each.predicted)


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_rounds_without_room_for_candidates_are_explained_too(
    pair: TinyPair, policy: str, most: int
) -> None:
    engine = Engine(pair, policy=make(policy), slots=2, trace=True)
    done = engine.generate(requests_of(SOME[:4], replace(GREEDY, max_new_tokens=most)))
    assert [len(each.output_ids) for each in done] == [most] * 4
    assert all(each.reason for completion in done for each in completion.trace)


# --------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("policy", ESTIMATING)
def test_calibration_books_exactly_the_judged_candidates(
    with_end: TinyPair, policy: str, mode: str
) -> None:
    """Accepted ones and the first refused one of a round; what was trimmed was not judged."""
    done, _ = run(with_end, make(policy), mode=mode, share=0.1, trace=True, lookup=False)
    some = 0
    for completion in done:
        judged: dict[int, list[tuple[float, bool]]] = defaultdict(list)
        for each in completion.trace:
            seen = each.accepted + (each.submitted > each.accepted)
            size = max(128, 1 << (each.context - 1).bit_length())
            judged[size] += [(each.predicted[i], i < each.accepted) for i in range(seen)]
        booked = completion.calibration
        assert set(booked) == {size for size, pairs in judged.items() if pairs}
        for size, calibration in booked.items():
            assert calibration.judged == len(judged[size])
            assert calibration.bins[:, 1].sum() == pytest.approx(sum(p for p, _ in judged[size]))
            assert calibration.bins[:, 2].sum() == sum(stood for _, stood in judged[size])
            some += len(judged[size])
    assert some > 50


@pytest.mark.parametrize("policy", ["none", "fixed 4", "heuristic", "confidence", "entropy"])
def test_policies_that_predict_nothing_have_no_calibration(pair: TinyPair, policy: str) -> None:
    done, _ = run(pair, make(policy), trace=True)
    assert all(not completion.calibration for completion in done)
    assert all(not each.predicted for completion in done for each in completion.trace)


# ------------------------------------------------------------------------ the draft's cache


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "greedy"])
@pytest.mark.parametrize("policy", ["fixed 4", "head online", "goodput stated"])
def test_the_draft_catches_up_after_control_rounds(
    self_pair: TinyPair, policy: str, sampled: bool, mode: str
) -> None:
    """A draft that is the target has everything accepted, unless its cache is stale."""
    options: Any = {"mode": mode, "sampled": sampled, "share": 0.4, "trace": True}
    done, engine = run(self_pair, make(policy), lookup=False, **options)
    counts = engine.stats.counts
    assert counts.accepted == counts.verified > 0
    after = [
        then.submitted
        for completion in done
        for now, then in pairwise(completion.trace)
        if now.reason == "control round"
    ]
    assert sum(after) > 0


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("idle", [30, 70])
def test_the_draft_catches_up_after_a_long_time_without_candidates(
    self_pair: TinyPair, idle: int, mode: str
) -> None:
    """More tokens are pending than a chunk of prefill holds."""
    sampling = replace(SAMPLED, max_new_tokens=idle + 40)
    policy = Scripted([0] * idle + [4] * 4)
    engine = Engine(self_pair, policy=policy, verification=mode, slots=1, prefill_chunk=16)  # type: ignore[arg-type]
    (done,) = engine.generate(requests_of(SOME[2:3], sampling))
    assert done.counts.accepted == done.counts.verified >= 12


class Watched(StatedGoodput):
    """Keeps what it was told."""

    def __init__(self, like: StatedGoodput) -> None:
        super().__init__(like.estimator, None, like.costs, like.k_max)
        self.outcomes: list[RoundOutcome] = []

    def observe(self, outcome: RoundOutcome) -> None:
        super().observe(outcome)
        self.outcomes.append(outcome)


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
def test_what_the_policy_is_told_of_a_round_is_what_happened(pair: TinyPair, mode: str) -> None:
    policy = Watched(stated_goodput())
    _, engine = run(pair, policy, mode=mode, share=0.1)
    seen, stats = policy.outcomes, engine.stats
    assert len(seen) == stats.rounds
    assert sum(each.verify_cost[0] for each in seen) == stats.target_tokens
    assert sum(len(each.draft_costs) for each in seen) <= stats.draft_forwards
    assert sum(sum(each.drafted) for each in seen) == stats.counts.drafted
    assert sum(sum(each.submitted) for each in seen) == stats.counts.verified
    assert sum(sum(each.accepted) for each in seen) >= stats.counts.accepted
    for each in seen:
        assert all(0 <= a <= s for a, s in zip(each.accepted, each.submitted, strict=True))
        room = each.start.nodes if each.parents else each.start.room
        assert all(k <= r for k, r in zip(each.drafted, room, strict=True))
        assert each.start.free_trimming == (mode == "coupled")
        assert all(seconds > 0 for _, seconds in [*each.draft_costs, each.verify_cost])
