from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from specdec.policies.base import DraftStep, RoundOutcome, RoundStart, Signal
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.registry import make_policy
from specdec.policies.simple import Fixed
from specdec.request import Counts
from specdec.simulate.bound import least_seconds
from specdec.simulate.replay import acceptance, acceptance_by_position, faster, replay
from specdec.simulate.transcripts import Transcript, load_transcripts, save_transcripts
from tests.specdec.workloads import linear, staircase

DEPTH = 7
COSTS = CostModel(linear(1.0, 0.25), linear(4.0, 0.5))


def transcript_of(
    accepted: Sequence[int], *, prompt: int = 9, limit: int = 99, seed: int = 0, group: str = ""
) -> Transcript:
    """A transcript whose every signal is another number."""
    flags = np.array(accepted, dtype=bool)
    chance = np.random.default_rng(seed)
    n = len(flags)
    starts = [t for t in range(n) if not flags[t] or t == n - 1]
    branch_of = np.full(n, -1, dtype=np.int64)
    branch_of[starts] = np.arange(len(starts))
    signals = chance.normal(-1, 1, (n, 1, len(Signal))).astype(np.float32)
    branches = chance.normal(-1, 1, (len(starts), DEPTH, 1, len(Signal))).astype(np.float32)
    for array in (signals, branches):
        array[..., Signal.ENTROPY] = abs(array[..., Signal.ENTROPY])
    ranks = 1 - flags.astype(np.int64)
    return Transcript(f"r{seed}", group, prompt, limit, False, ranks, signals, branch_of, branches)


def random_transcripts(rows: int = 12, rate: float = 0.6, tokens: int = 60) -> list[Transcript]:
    """Acceptance that the signals tell of, so that there is something to learn."""
    chance = np.random.default_rng(7)
    transcripts = []
    for i in range(rows):
        n = int(chance.integers(tokens // 2, tokens))
        chances = chance.beta(4 * rate, 4 * (1 - rate), n)
        transcript = transcript_of(chance.random(n) < chances, seed=i, group="ab"[i % 2])
        transcript.signals[..., [Signal.LOG_Q, Signal.LOG_TOP]] = np.log(chances)[:, None, None]
        transcript.branches[..., [Signal.LOG_Q, Signal.LOG_TOP]] = np.log(rate)
        transcripts.append(transcript)
    return transcripts


# -------------------------------------------------------------------------------- fixed


def test_fixed_by_hand() -> None:
    # Position 0 came with the prompt; rounds of 2 begin at 1, 4, 6, 7.
    transcript = transcript_of([0, 1, 1, 0, 1, 0, 0, 1])
    done = replay([transcript], Fixed(2), COSTS)
    # 1: both accepted, and a bonus; 4: one of two; 6: none of two; 7: the last token, accepted.
    assert done.rows == [Counts(rounds=4, drafted=8, verified=8, accepted=4, committed=7)]
    draft, verify = COSTS.draft, COSTS.verify
    first = [draft(10) + draft(1), draft(2) + draft(1), draft(1) + draft(1), draft(1) + draft(1)]
    assert done.seconds == pytest.approx(sum(first) + 4 * verify(3))
    assert done.verification_rate == 4 / 7
    assert done.discard_rate == 4 / 7


def test_no_speculation_is_one_round_a_token() -> None:
    transcripts = [transcript_of([1] * 5), transcript_of([0]), transcript_of([1, 0, 1])]
    done = replay(transcripts, make_policy("none"), COSTS)
    assert [row.rounds for row in done.rows] == [4, 0, 2]
    assert done.row_seconds == pytest.approx([4 * COSTS.verify(1), 0, 2 * COSTS.verify(1)])


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("live", [1, 3])
def test_fixed_agrees_with_a_direct_count(k: int, live: int) -> None:
    transcripts = random_transcripts()
    done = replay(transcripts, Fixed(k), COSTS, live)
    for transcript, counts in zip(transcripts, done.rows, strict=True):
        at, expected = 1, Counts()
        while at < len(transcript.accepted):
            run = 0
            while run < k and at + run < len(transcript.accepted) and transcript.accepted[at + run]:
                run += 1
            kept = min(run + 1, len(transcript.accepted) - at)
            expected.add(Counts(1, k, k, run, kept))
            at += kept
        assert counts == expected


def test_the_limit_bounds_candidates() -> None:
    done = replay([transcript_of([1] * 6, limit=5)], Fixed(8), COSTS)
    assert done.rows == [Counts(rounds=1, drafted=4, verified=4, accepted=4, committed=5)]


def test_a_steady_replay_counts_full_rounds_only() -> None:
    transcripts = [transcript_of([0] * 4, seed=i) for i in range(3)]
    done = replay(transcripts, Fixed(1), COSTS, 2, steady=True)
    # 8 rows of 3 rounds each go through 2 slots in step: 12 rounds.
    assert done.counts.rounds == 24
    draft = 4 * (COSTS.draft(20) + 2 * COSTS.draft(2))
    assert done.seconds == pytest.approx(draft + 12 * COSTS.verify(4))


# ------------------------------------------------------------------ what policies are told


class Recorder(Fixed):
    """Keeps what it is told."""

    def __init__(self, script: Sequence[int]) -> None:
        super().__init__(0)
        self.script, self.wanted = list(script), frozenset({Signal.LOG_Q})
        self.starts: list[RoundStart] = []
        self.steps: list[DraftStep] = []
        self.outcomes: list[RoundOutcome] = []

    def budget(self, start: RoundStart) -> list[int]:
        self.starts.append(start)
        return [self.script[len(self.starts) - 1]] * len(start.rows)

    def go_on(self, step: DraftStep) -> np.ndarray:
        self.steps.append(step)
        return super().go_on(step)

    def observe(self, outcome: RoundOutcome) -> None:
        self.outcomes.append(outcome)


def test_the_draft_lacks_what_the_engine_says() -> None:
    # none, none, then 2 accepted of 2, 1 of 2, none.
    transcript = transcript_of([0, 0, 0, 1, 1, 0, 1, 0, 0, 1])
    policy = Recorder([0, 0, 2, 2, 0, 1])
    replay([transcript], policy, COSTS)
    assert [start.draft_pending for start in policy.starts] == [[10], [11], [12], [2], [1], [2]]
    assert [start.contexts for start in policy.starts] == [[10], [11], [12], [15], [17], [18]]
    assert [outcome.accepted for outcome in policy.outcomes] == [[0], [0], [2], [1], [0], [1]]


def test_behind_a_wrong_candidate_a_policy_sees_the_branch() -> None:
    transcript = transcript_of([0, 1, 0, 1, 1])
    policy = Recorder([4, 4, 4])
    replay([transcript], policy, COSTS)
    seen = np.concatenate([step.signals for step in policy.steps[:4]])
    expected = [
        transcript.signals[1, 0],
        transcript.signals[2, 0],
        transcript.branches[1, 0, 0],
        transcript.branches[1, 1, 0],
    ]
    assert np.array_equal(seen, np.array(expected, dtype=np.float64))
    # From 3 the text is accepted to its end; what is drafted past it has signals and no verdict.
    seen = np.concatenate([step.signals for step in policy.steps[4:]])
    expected = [
        transcript.signals[3, 0],
        transcript.signals[4, 0],
        transcript.branches[2, 0, 0],
        transcript.branches[2, 1, 0],
    ]
    assert np.array_equal(seen, np.array(expected, dtype=np.float64))
    last = policy.outcomes[-1]
    assert (last.drafted, last.submitted, last.accepted) == ([4], [2], [2])


def test_rows_are_refilled() -> None:
    transcripts = [transcript_of([0] * n, seed=n) for n in (2, 5, 3)]
    policy = Recorder([0] * 9)
    replay(transcripts, policy, COSTS, live=2)
    assert [len(start.rows) for start in policy.starts] == [2, 2, 2, 1]


# ------------------------------------------------------------------------------- the bound

POLICIES = [
    ("none", {}),
    *(("fixed", {"k": k}) for k in range(1, 9)),
    ("heuristic", {}),
    ("confidence", {}),
    ("entropy", {}),
    *(("head", {"threshold": h, "estimator": "confidence"}) for h in (0.1, 0.5, 0.9)),
    ("goodput", {}),
]

CURVES = {
    "linear": COSTS,
    "staircase": CostModel(staircase(4, 0.3), staircase(8, 1.5)),
    "draft is costly": CostModel(linear(4.0, 0.5), linear(4.0, 0.5)),
    "draft is free": CostModel(linear(1e-6, 0.0), staircase(8, 0.6)),
    "falls": CostModel(CostTable([1, 2, 40], [1, 0.6, 3]), CostTable([1, 3, 60], [5, 3, 20])),
}


@pytest.mark.parametrize("curves", CURVES)
@pytest.mark.parametrize("live", [1, 4])
def test_no_policy_beats_the_clairvoyant(curves: str, live: int) -> None:
    costs, transcripts = CURVES[curves], random_transcripts()
    bound = least_seconds(transcripts, costs, live)
    for name, options in POLICIES:
        own = {"costs": copy.deepcopy(costs)} if name == "goodput" else {}
        done = replay(transcripts, make_policy(name, **options, **own), costs, live)
        assert done.seconds >= bound.sum() - 1e-9, name
        if live == 1:
            assert (done.row_seconds >= bound - 1e-9).all(), name


def test_the_clairvoyant_by_hand() -> None:
    # 0 0 | 1 1 1 0: with free drafts 1 round for the run and its bonus, beside 1 for position 1.
    transcript = transcript_of([0, 0, 1, 1, 1, 0])
    costs = CostModel(linear(0.0, 1e-9), linear(5.0, 1e-9))
    assert least_seconds([transcript], costs) == pytest.approx([10], abs=1e-6)
    # Where drafting costs as much as it can bring, nobody drafts.
    costs = CostModel(linear(9.0, 0.0), linear(5.0, 0.0))
    assert least_seconds([transcript], costs) == pytest.approx([25])
    # In between: a candidate costs 2, and a round 5.
    costs = CostModel(linear(2.0, 0.0), linear(5.0, 0.0))
    assert least_seconds([transcript], costs) == pytest.approx([5 + 5 + 3 * 2])


def test_all_accepted_and_free_is_reached() -> None:
    transcripts = [transcript_of([1] * 41, prompt=1, limit=40, seed=i) for i in range(4)]
    costs = CostModel(linear(1.0, 0.0), linear(5.0, 0.0))
    for live in (1, 2):
        done = replay(transcripts, Fixed(8), costs, live)
        assert done.seconds == pytest.approx(least_seconds(transcripts, costs, live).sum(), rel=0.2)


# -------------------------------------------------------------------------- goodput, in short


@pytest.mark.parametrize(
    ("live", "free", "counts"),
    [
        (1, False, (395, 1713, 1713, 530)),
        (4, False, (450, 1182, 1152, 474)),
        (4, True, (450, 1201, 1193, 473)),
    ],
)
def test_chains_are_what_they_were(live: int, free: bool, counts: tuple[int, ...]) -> None:
    """Rounds, and candidates drafted, verified and accepted; else decisions have changed."""
    transcripts = [replace(each, free_trimming=free) for each in random_transcripts(20)]
    costs = CostModel(linear(0.05, 0.001), staircase(8, 0.2))
    policy = make_policy("goodput", costs=copy.deepcopy(costs), width=1)
    done = replay(transcripts, policy, costs, live).counts
    assert (done.rounds, done.drafted, done.verified, done.accepted) == counts


@pytest.mark.parametrize("live", [1, 4])
def test_goodput_once_warm_is_near_the_best_fixed(live: int) -> None:
    transcripts = random_transcripts(30)
    for costs in (COSTS, CURVES["staircase"]):
        policy = make_policy("goodput", costs=copy.deepcopy(costs), k_max=8)
        replay(transcripts, policy, costs, live)
        ours = replay(transcripts, policy, costs, live).tokens_per_second
        fixed = max(
            replay(transcripts, make_policy("fixed", k=k), costs, live).tokens_per_second
            for k in range(9)
        )
        assert ours > 0.97 * fixed


# ------------------------------------------------------------------------------ statistics


def test_a_policy_is_as_fast_as_itself() -> None:
    done = replay(random_transcripts(), Fixed(2), COSTS)
    same = faster(done, done)
    assert (same.value, same.low, same.high) == (1, 1, 1)


def test_faster_is_a_ratio_of_speeds() -> None:
    transcripts = random_transcripts(40)
    none, two = (replay(transcripts, Fixed(k), COSTS) for k in (0, 2))
    ratio = faster(none, two)
    assert ratio.value == pytest.approx(two.tokens_per_second / none.tokens_per_second)
    assert ratio.low < ratio.value < ratio.high
    assert ratio.high - ratio.low < 0.2


def test_acceptance_by_position() -> None:
    found = acceptance_by_position([transcript_of([0, 1, 1, 0, 0, 1, 0])], most=2)
    # Rounds of 2 from 1: both stand; 4: none; 5: one of two.
    (first, met), (second, met_second) = found
    assert (first.value, met) == (pytest.approx(2 / 3), 3)
    assert (second.value, met_second) == (1 / 2, 2)
    assert acceptance([transcript_of([0, 1, 1, 0])]).value == 0.5


# ------------------------------------------------------------------------------------ files


def test_transcripts_survive_a_file(tmp_path: Path) -> None:
    transcripts = [*random_transcripts(3), replace_group(transcript_of([1, 1]), "x")]
    save_transcripts(tmp_path / "t.safetensors", transcripts, {"pair": "tiny", "temperature": 1})
    loaded, about = load_transcripts(tmp_path / "t.safetensors")
    assert about == {"pair": "tiny", "temperature": 1}
    for before, after in zip(transcripts, loaded, strict=True):
        for name in ("id", "group", "prompt_tokens", "limit", "free_trimming"):
            assert getattr(before, name) == getattr(after, name)
        for name in ("ranks", "signals", "branch_of", "branches", "runs"):
            assert np.array_equal(getattr(before, name), getattr(after, name))
    policies = [make_policy("head", estimator="confidence") for _ in range(2)]
    results = [replay(t, p, COSTS) for t, p in zip((transcripts, loaded), policies, strict=True)]
    assert results[0].rows == results[1].rows


def replace_group(transcript: Transcript, group: str) -> Transcript:
    names = [field.name for field in fields(Transcript) if field.init]
    return Transcript(**{**{n: getattr(transcript, n) for n in names}, "group": group})
